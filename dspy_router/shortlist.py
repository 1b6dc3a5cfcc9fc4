"""An agent that is shown only the likeliest few of many tools."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import dspy

from dspy_router.deciding import Policies, policies, read_call
from dspy_router.errors import RouteError
from dspy_router.optimizers.rollouts import check_examples
from dspy_router.probabilities import likeliest
from dspy_router.route import DifferentiableRoute
from dspy_router.tables import table

ENDS = ("finish", "submit")  # the tool by which ReAct, or ReActV2, ends a run


class Shortlist(dspy.Module):
    """Show a `dspy.ReAct` or `dspy.ReActV2` only the k tools that a route finds likeliest for a request.

    The agent's prompt then grows with k, not with the number of tools. Where the route has a guard and declines, the
    agent sees all its tools: a tool that may be needed is never hidden silently. Tools that the route does not know are
    always shown. The agent's own predictors do the work, so its demos, its LM and what optimizers make of it stay;
    instructions that an optimizer has rewritten are used as they are, with all they say of tools.

    Args:
        agent: Its tools are all that can be shown.
        route: Decides one field among tools of the agent; its inputs are among the agent's. Compile it by itself, on
            examples with the tool that is needed first, or any that is needed; of a run of the agent that is
            `prediction.trajectory["tool_name_0"]`. To show tools is no decision: nothing of it is recorded or explored,
            and no run of a `Shortlist` teaches its route.
        k: How many tools are shown, at least 1.

    Raises:
        RouteError: If `k` is out of range, or the route names a tool or an input that the agent does not have.

    Example:
        >>> import dspy
        >>> from dspy_router import DifferentiableRoute
        >>> from dspy_router.shortlist import Shortlist
        >>> def get_weather(city: str): "The weather forecast for a city."
        >>> def play_music(artist: str): "Play songs by an artist."
        >>> def book_table(place: str): "Book a table at a restaurant."
        >>> agent = dspy.ReAct("request -> answer", tools=[get_weather, play_music, book_table])
        >>> route = DifferentiableRoute("request -> tool", tools=[get_weather, play_music, book_table])
        >>> Shortlist(agent, route, k=1).tools_for(request="will it rain in Oslo?")
        ('get_weather',)
    """

    def __init__(self, agent: "dspy.ReAct | dspy.ReActV2", route: DifferentiableRoute, k: int) -> None:
        super().__init__()
        if len(route.fields) != 1 or (strangers := set(route.fields[0].option_names) - set(agent.tools)):
            raise RouteError(
                f"The route decides { {field.name: field.option_names for field in route.fields} }; the agent's tools "
                f"are {list(agent.tools)}"
                + (f", without {sorted(strangers)}." if len(route.fields) == 1 else ": give a route with one field.")
            )
        if missing := [name for name in route.signature.input_fields if name not in agent.signature.input_fields]:
            raise RouteError(
                f"The route reads {missing}, which the agent does not get: its inputs are "
                f"{list(agent.signature.input_fields)}."
            )
        if k < 1:
            raise RouteError(f"k={k}: show at least one tool.")
        user_tools = [tool for name, tool in agent.tools.items() if name not in ENDS]
        # What an agent's prompt says before an optimizer has rewritten it.
        self._instructions = type(agent)(agent.signature, user_tools).react.signature.instructions
        self.agent = agent
        self.route = route
        self.k = k

    def forward(self, **inputs: Any) -> dspy.Prediction:
        """Answer as the agent does; the prediction also has `shortlist`, the tools it was shown."""
        call = read_call(self.route, self._read(inputs))
        names = self._names(policies(self.route, call, self.route.encoder.encode_one(call.text)))
        return _told(self._agent(names)(**inputs), names)

    async def aforward(self, **inputs: Any) -> dspy.Prediction:
        """`forward` for async code."""
        call = read_call(self.route, self._read(inputs))
        vector = await self.route.encoder.aencode_one(call.text)
        await self.route.learned.build()
        names = self._names(policies(self.route, call, vector))
        return _told(await self._agent(names).acall(**inputs), names)

    def tools_for(self, **inputs: Any) -> tuple[str, ...]:
        """The tools the agent is shown for these inputs, likeliest first; all of the route's where it declines."""
        call = read_call(self.route, self._read(inputs))
        return self._names(policies(self.route, call, self.route.encoder.encode_one(call.text)))

    def recall(self, examples: Sequence[dspy.Example], field: str | None = None) -> "RecallReport":
        """How often all tools an example needs are among the k likeliest, for every k.

        Args:
            examples: With inputs, and the needed tool, or a list of them, in `field`.
            field: By default the route's.

        Raises:
            RouteError: If there are no examples, or one has no inputs or needs no tool of the route's.
        """
        field = field or self.route.fields[0].name
        check_examples(examples, "examples")
        ranks, declined = [], 0
        for example in examples:
            call = read_call(self.route, self._read(example.inputs()))
            thought = policies(self.route, call, self.route.encoder.encode_one(call.text))
            order = list(likeliest(thought.probabilities[self.route.fields[0].name], len(self.route.fields[0].options)))
            needed = example.get(field)
            if not needed:
                raise RouteError(
                    f"An example has no {field!r}, the tool it needs: {str(example)[:80]}. Or name another field."
                )
            wanted = [needed] if isinstance(needed, str) else list(needed)
            if unknown := [name for name in wanted if name not in order]:
                raise RouteError(f"An example needs {unknown} in {field!r}; the route's tools are {order}.")
            ranks.append(max(order.index(name) for name in wanted) + 1)
            declined += thought.declined
        shares = {
            k: sum(rank <= k for rank in ranks) / len(ranks) for k in range(1, len(self.route.fields[0].options) + 1)
        }
        return RecallReport(len(ranks), declined, self.k, shares)

    def _read(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {name: inputs[name] for name in self.route.signature.input_fields if name in inputs}

    def _names(self, thought: Policies) -> tuple[str, ...]:
        probabilities = thought.probabilities[self.route.fields[0].name]
        return tuple(likeliest(probabilities, len(probabilities) if thought.declined else self.k))

    def _agent(self, names: Collection[str]) -> Any:
        """The agent with these tools and those the route does not know; its predictors are the agent's own."""
        own, options = self.agent, self.route.fields[0].option_names
        if len(names) == len(options):
            return own
        others = [name for name in own.tools if name not in (*options, *ENDS)]
        shown: Any = type(own)(own.signature, [own.tools[name] for name in (*names, *others)], own.max_iters)
        signature = own.react.signature
        if signature.instructions == self._instructions:
            signature = signature.with_instructions(shown.react.signature.instructions)
        for name, info in shown.react.signature.output_fields.items():
            signature = signature.with_updated_fields(name, type_=info.annotation)  # the tools' names, where listed
        shown.react = _WithSignature(own.react, signature)
        if hasattr(own, "extract"):
            shown.extract = own.extract
        shown.callbacks = own.callbacks
        return shown


@dataclass(frozen=True)
class RecallReport:
    """How often what is needed is on the list.

    Attributes:
        rows: Examples.
        declined: Those in which the route declines, so that the agent sees all tools.
        k: How many tools are shown.
        recall: By number of tools shown, share of examples whose needed tools are all among them.
    """

    rows: int
    declined: int
    k: int
    recall: Mapping[int, float]

    def __str__(self) -> str:
        return self._table("simple")

    def _repr_html_(self) -> str:
        return self._table("html")

    def _table(self, form: str) -> str:
        shown = [k for k in (1, 2, 3, 5, 10, 20, 50, 100, self.k) if k in self.recall]
        lines = [(k, f"{self.recall[k]:.3f}", "shown" if k == self.k else "") for k in sorted(set(shown))]
        return table(lines, headers=("k", "recall@k", f"of {self.rows:,}, {self.declined:,} declined"), form=form)


class _WithSignature:
    """A predictor called with another signature, so that traces and histories are the predictor's own."""

    def __init__(self, predictor: dspy.Predict, signature: type[dspy.Signature]) -> None:
        self._predictor, self._signature = predictor, signature

    def __call__(self, **inputs: Any) -> dspy.Prediction:
        return self._predictor(signature=self._signature, **inputs)

    async def acall(self, **inputs: Any) -> dspy.Prediction:
        return await self._predictor.acall(signature=self._signature, **inputs)


def _told(prediction: dspy.Prediction, names: tuple[str, ...]) -> dspy.Prediction:
    if "shortlist" not in prediction:
        prediction["shortlist"] = names
    return prediction
