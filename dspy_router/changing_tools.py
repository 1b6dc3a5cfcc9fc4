"""Adding tools to a route and taking them away, without training it again."""

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from dspy_router.encoders.step import StepEncoder
from dspy_router.errors import RouteError
from dspy_router.fields import DecisionField
from dspy_router.options import Tools, encode_options, parse_tools, require_distinct

if TYPE_CHECKING:
    from dspy_router.heads import OptionHead
    from dspy_router.learning.reference import Reference
    from dspy_router.route import DifferentiableRoute


def add_tools(route: "DifferentiableRoute", tools: Tools, field: str | None = None) -> None:
    """What `DifferentiableRoute.add_tools` does; see there."""
    import torch

    from dspy_router.learning.new_options import with_new_options

    changed = _changed_field(route, field)
    options = parse_tools(tools)
    require_distinct((*changed.options, *options), f"Output field {changed.name!r}, with the new tools,")
    vectors = encode_options([option.texts for option in options], route.encoder.encode)
    head, record = route.head[changed.name], route.learned.record
    reference = record.references.get(changed.name) if record is not None else None
    transfer = record.transfers.get(changed.name) if record is not None else None
    if transfer is None:
        head = head.with_added(torch.from_numpy(vectors))
    elif changed.several:
        own = torch.from_numpy(vectors) * transfer.scale
        offsets = torch.full((len(options),), transfer.offset)
        head = head.with_added(torch.from_numpy(vectors), head.temperature * own, head.temperature * offsets)
    else:
        head = with_new_options(head, vectors, transfer, trained=reference.trained if reference is not None else None)
    if reference is not None:
        reference = reference.with_options([option.name for option in options], vectors)
    _change(route, replace(changed, options=(*changed.options, *options)), head, reference)


def remove_tools(route: "DifferentiableRoute", names: Collection[str], field: str | None = None) -> None:
    """What `DifferentiableRoute.remove_tools` does; see there."""
    changed = _changed_field(route, field)
    gone = {names} if isinstance(names, str) else set(names)
    if unknown := sorted(gone - set(changed.option_names)):
        raise RouteError(f"remove_tools: {unknown} are no tools of {changed.name!r}, which has {changed.option_names}.")
    stays = tuple(option for option in changed.options if option.name not in gone)
    if len(stays) < changed.fewest:
        raise RouteError(
            f"Without {sorted(gone)} the field {changed.name!r} would have {len(stays)} of {len(changed.options)} "
            f"tools: there would be nothing to decide. Leave at least {'one' if changed.several else 'two'}."
        )
    head = route.head[changed.name].without([changed.option_names.index(name) for name in gone])
    record = route.learned.record
    reference = record.references.get(changed.name) if record is not None else None
    reference = reference.without_options(gone) if reference is not None else None
    _change(route, replace(changed, options=stays), head, reference)


def _changed_field(route: "DifferentiableRoute", name: str | None) -> DecisionField:
    if isinstance(route.encoder, StepEncoder):
        raise RouteError(
            "The tools of an agent are fixed: its route reads which of them have been called. Make a RoutedAgent with "
            "the other tools, and train it with the same rows."
        )
    open_ = [field for field in route.fields if field.is_open]
    if name is None and len(open_) == 1:
        return open_[0]
    field = route.field(name) if name is not None else None
    if field is None or field not in open_:
        raise RouteError(
            f"field={name!r}: the fields whose options come from tools are {[field.name for field in open_]}. Where "
            "the signature lists the options, change the signature and train again; or declare the field as str, or "
            "list[str]."
        )
    return field


def _change(
    route: "DifferentiableRoute", field: DecisionField, head: "OptionHead", reference: "Reference | None"
) -> None:
    from dspy_router.heads import RouteHead

    learned = route.learned
    heads = {each.name: head if each.name == field.name else learned.head[each.name] for each in learned.fields}
    if learned.record is not None:
        references = {name: kept for name, kept in learned.record.references.items() if name != field.name}
        if reference is not None:
            references[field.name] = reference
        learned.record = replace(learned.record, references=references)
    learned.replace(
        tuple(field if each.name == field.name else each for each in learned.fields),
        RouteHead(list(heads), list(heads.values())),
    )
