"""Instructions of one decision beyond its encoder, counted by valgrind: the same on a busy machine as on a quiet one.

    python benchmarks/instructions.py

Needs `valgrind` (a Debian package). A process under callgrind decides so many texts with an encoder that costs next to
nothing, then calls a DSPy module that does nothing as often; counting is switched on for these two parts alone.
`tests/test_overhead.py` counts Python's own instructions wherever the tests run; this counts the machine's, numpy's and
DSPy's included.
"""

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

CALLS = 200
OPTIONS = 150
COUNTED = """
import os, subprocess
import dspy
import numpy as np
from dspy_router import DifferentiableRoute

vector = np.random.default_rng(0).standard_normal((1, 384)).astype(np.float32)
class Nothing(dspy.Module):
    def forward(self, text):
        return dspy.Prediction(option="")

route = DifferentiableRoute("text -> option", tools=[f"option {{n}}" for n in range({options})],
                            encoder=lambda texts: np.repeat(vector, len(texts), axis=0))
for module in (route, Nothing()):
    for number in range(20):
        module(text=f"warm up {{number}}")
    texts = [f"text {{number}}" for number in range({calls})]
    subprocess.run(["callgrind_control", "--instr=on", str(os.getpid())], check=True, stdout=subprocess.DEVNULL)
    for text in texts:
        module(text=text)
    subprocess.run(["callgrind_control", "--dump", str(os.getpid())], check=True, stdout=subprocess.DEVNULL)
    subprocess.run(["callgrind_control", "--instr=off", str(os.getpid())], check=True, stdout=subprocess.DEVNULL)
"""


def main() -> None:
    """Count and print."""
    if shutil.which("valgrind") is None:
        sys.exit("valgrind is not installed: apt-get install valgrind")
    decision, nothing = count()
    print(f"one decision among {OPTIONS} options: {decision:,.0f} instructions, hardly any the encoder's")
    print(f"DSPy's call of a module that does nothing: {nothing:,.0f}")


def count() -> list[float]:
    """Instructions a call, of a decision and of DSPy's trivial module call."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "callgrind.out")
        code = COUNTED.format(options=OPTIONS, calls=CALLS)
        command = ["valgrind", "--tool=callgrind", "--instr-atstart=no", f"--callgrind-out-file={out}"]
        subprocess.run([*command, sys.executable, "-c", code], check=True, capture_output=True)
        dumps = sorted(Path(folder).glob("callgrind.out.*"), key=lambda path: int(path.suffix[1:]))
        totals = [re.search(r"^totals: (\d+)", dump.read_text(), re.MULTILINE) for dump in dumps]
    return [int(total.group(1)) / CALLS for total in totals if total][:2]


if __name__ == "__main__":
    main()
