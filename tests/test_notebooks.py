"""Every notebook runs from top to bottom in a fresh kernel, and what its text claims holds there."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOKS = sorted((Path(__file__).parent.parent / "notebooks").glob("*.ipynb"))

# By notebook: expressions over its variables, asserted in a last cell.
CLAIMS = {
    "01_quickstart": [
        "evaluate(trained).score > evaluate(routed).score + 5",
        "float(loss) < 0.5",
    ],
    "02_learn_from_the_metric": [
        "before + 0.05 < learned[-1] <= 1",
        "abs(skyline - learned[-1]) < 0.03",
        "rollouts[-1] < 800",
        "reports['1 in 10 wrong, measured'].noise > 0",
        "accuracies['1 in 10 wrong, believed'] < accuracies['1 in 10 wrong, measured'] < 1",
        "frontier[0].cost > frontier[3].cost > frontier[-1].cost",
        "all(reward > before + (1 - before) * cost / (1000 * PRICE) for cost, reward in checked.values())",
        "comparison.verdict == 'switch'",
        "truth['untrained'] + 0.05 < truth['candidate']",
        "all(abs(found.evaluation.estimates['doubly robust'].reward.value - truth[name]) < 0.06"
        " for name, (_, found) in judged.items())",
        "unjudged.verdict == 'no verdict'",
    ],
    "03_alongside_teleprompters": [
        "results['RouteFinetune'].right > results['as it was'].right + 0.05",
        "results['GEPA'].right == results['as it was'].right",
        "BREVITY in prompted.writer.signature.instructions and NAMING in prompted.writer.signature.instructions",
        "min(results['r -> p'].score, results['p -> r -> p'].score)"
        " > max(results['RouteFinetune'].score, results['GEPA'].score) + 0.05",
        "abs(results['p -> r -> p'].score - results['p -> r -> p'].right) < 0.001",
        "abs(results['r -> p'].score - results['p -> r -> p'].score) < 0.05",
        "[result.calls for result in results.values()] == [2, 1, 1, 2, 1, 1]",
        "2 * results['RouteFinetune'].tokens < results['as it was'].tokens",
        "results['RouteFinetune'].metric_calls == 300 and results['GEPA'].metric_calls == 120",
        "results['GEPA'].lm_calls > 2 * results['GEPA'].metric_calls",
        "earned_back < 400",
        "all(same_head.values()) and all(same_instruction.values())",
        "not any(all(torch.equal(tensor, head(trained)[name]) for name, tensor in head(before).items())"
        " for before, trained in (('', 'r'), ('p', 'p -> r')))",
        "route_metric_calls['p -> r -> p'] < route_metric_calls['r -> p'] == 300",
        "after['p -> r -> p']['score'] == after['p -> r']['score']",
        "instruction('p -> r -> p') == instruction('p -> r')",
        "sum(agree) == len(testset) == 100",
        "careful_scores['untrained'][1] > careful_scores['untrained'][0] + 0.02",
        "careful_scores['trained'][1] == careful_scores['trained'][0] and not kept_weights['trained']",
    ],
    "04_knowing_when_not_to": [
        "diagrams['in scope'].error < 0.03 and diagrams['all requests'].error > 0.07",
        "areas['route.score'] > max(areas['maximum probability'], areas['semantic-router'])",
        "max(broken['guard, route.score'], broken['guard, maximum probability']) <= 0.1",
        "broken['route.score, without a test'] > 0.3",
        "coverages['guard, route.score'].mean() > coverages['guard, maximum probability'].mean() + 0.02",
        "risks['maximum probability ≥ 1 - risk'].max() < 0.03",
        "broken['semantic-router, calibrated ≥ 1 - risk'] > DELTA",
        "few.threshold is None and few.rows == 161 and rows_needed(RISK, DELTA) == 64",
        "outcome['route, else the old planner'][0] > outcome['old planner alone'][0] > outcome['route alone'][0]",
        "outcome['route, else the old planner'][1] < 0.3",
        "quiet and audit.report.drifted and not audit.alarmed",
        "second_audit.alarmed and not second_audit.report.drifted",
        "same_logits and promised_then is None and grown.promise is not None",
        "unpromised['car requests, intents by description'][0] > 0.8",
        "unpromised['all'][2] > RISK > promised_again['all'][2]",
        "recall.recall[5] > 0.97 and 2 * mean_size < max(sizes.values())",
    ],
    "05_the_article": [
        "all(len(run.prompts) == len(task.plan) + 2"
        " for run, task in zip(runs['an LLM, dspy.ReAct'], tasks.tasks, strict=True))",
        "all(run.right for name in ('an LLM, dspy.Predict', 'an LLM, dspy.ReAct') for run in runs[name])",
        "fmean(run.right for run in runs['a route, untrained']) < 0.85"
        " and fmean(run.right for run in runs['a route']) > 0.9",
        "bill['a route'] < 0.2 * bill['an LLM, dspy.ReAct']",
        "all(len(routed.prompts) == 1 and len(planned.prompts) == depth + 2 and planned.right and routed.right"
        " for depth, (planned, routed) in zip(DEPTHS, growth, strict=True))",
        "max(apart_from_results) - min(apart_from_results) <= 2",
        "max(ratios) <= 0.15 and ratios[-1] < 0.04",
        "costs['RoutedAgent'][-1] < 0.15 * costs['dspy.ReAct, cached'][-1] < costs['dspy.ReAct'][-1]",
        "[fmean(run.right for run in found) > 0.9 for found in by_source.values()] == [True, False, False, True, True]",
        "0.25 < sum(sum(run.prompts) for run in by_source['an LM for both'])"
        " / sum(sum(run.prompts) for run in by_source['dspy.ReAct']) < 0.4",
        "abs(fmean(len(run.prompts) for run in by_source['an LM for both'])"
        " - fmean(len(task.plan) + 1 for task in tasks.tasks)) < 0.1",
        "fmean(curve[10]) + 0.05 < fmean(curve[120]) and fmean(never_seen) < 0.7",
        "120 < earned_back < 170",
    ],
    "06_routed_agent": [
        "len(calls_of(prediction)) > 2 and '103320' in prediction.trajectory['observation_1']",
        "fmean(agree[0]) < 0.6 and fmean(agree[1]) > 0.8",
        "fmean(results['untrained'].right) < 0.8 and fmean(results['96 recorded runs'].right) > 0.9",
        "fmean(results['160 metric calls'].right) <= fmean(results['16 recorded runs, 160 metric calls'].right)",
        "results[guarded_name].lm_calls < 0.6 * results['dspy.ReAct'].lm_calls",
        "fmean(results[guarded_name].right) >= fmean(results['96 recorded runs'].right)",
        "fmean(kept) >= 0.9 and len(mixed) > 10",
        "len(str(observations[2])) > 10_000_000 and len(sent) < 10_000",
        "same",
        "float(gain[0].split()[0]) > 3 and float(gain[0].split('[')[1].split(',')[0]) > 0",
        "wrong['route, state'].mean() > 1 / 3 and wrong['route, state'][table.chosen != 'reply'].mean() > 0.5",
        "curves['route, state'].coverage_at(0.1) < 0.35",
        "max(succeeded) < 0.5",
    ],
}


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs_and_shows_what_it_claims(path: Path, tmp_path: Path) -> None:
    notebook = nbformat.read(path, as_version=4)
    claims = "\n".join(f"assert {claim}, {claim!r}" for claim in CLAIMS[path.stem])
    notebook.cells.append(nbformat.v4.new_code_cell(claims))
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()
    shown = [output.get("data", {}) for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert any(data.get("text/html", "").startswith("<table>") for data in shown)
    assert any("image/png" in data for data in shown)
    assert not list(tmp_path.iterdir()), "A notebook leaves no files where it is run."


def test_there_are_notebooks() -> None:
    assert [path.stem for path in NOTEBOOKS] == sorted(CLAIMS)
