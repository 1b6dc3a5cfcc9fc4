"""A program that holds routes in every way a program can, and all that loading could change in it."""

import base64
import json
from typing import Any

import dspy
import torch
from safetensors.torch import load

from dspy_router import DifferentiableRoute, TokenEncoder
from dspy_router.parameter import RouteParameter
from dspy_router.persistence import network_state
from tests.programs import FRUIT, Shop, fruit_requests, fruit_route, order_route

REQUESTS = [example.request for example in fruit_requests(12, seed=7)]


class Kiosk(dspy.Module):
    """Two routes that share a trainable encoder, in a list; one in a dict; one with two fields, nested; a predictor."""

    def __init__(self) -> None:
        super().__init__()
        encoder = TokenEncoder(8, vocabulary=32)
        self.desks = [DifferentiableRoute("request -> fruit", tools=FRUIT, encoder=encoder) for _ in range(2)]
        self.carts = {"east": fruit_route()}
        self.shop = Shop(order_route())
        self.greeter = dspy.Predict("name -> greeting")


class Stand(dspy.Module):
    """The same without a predictor, whose part of a file has no checksum."""

    def __init__(self) -> None:
        super().__init__()
        kiosk = Kiosk()
        self.desks, self.carts, self.shop = kiosk.desks, kiosk.carts, kiosk.shop


def parameters(program: dspy.Module) -> dict[str, RouteParameter]:
    return {name: found for name, found in program.named_parameters() if isinstance(found, RouteParameter)}


def learned(program: dspy.Module, seed: int = 0) -> dspy.Module:
    """The program with other weights in every tensor that training changes, and with demos."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in parameters(program).values():
            for tensor in [*parameter.head.parameters(), *network_state(parameter.encoder).values()]:
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
            for head in parameter.head.heads:
                head.temperature.fill_(0.5 + torch.rand((), generator=generator).item())
    for predictor in program.predictors():
        predictor.demos = [dspy.Example(name=f"Ann {seed}", greeting="Hello!")]
    return program


def contents(program: dspy.Module) -> dict[str, Any]:
    """Every tensor of every route and of its encoder, bit for bit, and the state of every predictor."""
    found: dict[str, Any] = {
        name: json.dumps(predictor.dump_state(), sort_keys=True) for name, predictor in program.named_predictors()
    }
    for name, parameter in parameters(program).items():
        for tensor_name, tensor in parameter.head.state_dict().items():
            found[f"{name} {tensor_name}"] = tensor.numpy().tobytes()
        for tensor_name, tensor in network_state(parameter.encoder).items():
            found[f"{name} encoder {tensor_name}"] = tensor.numpy().tobytes()
    return found


def probabilities(route: DifferentiableRoute) -> list[dict[str, dict[str, float]]]:
    predictions = [route(request=request) for request in REQUESTS]
    return [{name: made.probabilities for name, made in found.decisions.items()} for found in predictions]


def routes(program: dspy.Module) -> list[DifferentiableRoute]:
    return [module for _, module in program.named_sub_modules() if isinstance(module, DifferentiableRoute)]


def tensors_of(state: dict[str, Any]) -> dict[str, torch.Tensor]:
    return load(base64.b64decode(state["tensors"]))


def nested(depth: int) -> list[Any]:
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value
