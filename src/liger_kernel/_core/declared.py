"""A loss declared once, by a frozen dataclass of its options: from it come the constructor and the attributes of the
module, and the arguments of the function."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import make_dataclass
from inspect import Parameter, Signature
from typing import TYPE_CHECKING, Any, ClassVar, Concatenate, ParamSpec

import torch
from torch import nn

P = ParamSpec("P")


def takes(
    options: Callable[P, Any],
) -> Callable[[Callable[[Any], None]], Callable[Concatenate[Any, P], None]]:
    """Decorates the `__init__` of a `LossModule`, which then takes the fields of the dataclass `options`, lets it check
    them, keeps each in an attribute, and runs its own body."""

    def decorate(body: Callable[[Any], None]) -> Callable[Concatenate[Any, P], None]:
        @functools.wraps(body)
        def init(self: Any, *args: P.args, **kwargs: P.kwargs) -> None:
            nn.Module.__init__(self)
            for name, value in vars(options(*args, **kwargs)).items():
                setattr(self, name, value)
            body(self)

        own = list(inspect.signature(body).parameters.values())
        its = inspect.signature(options).parameters
        bases = inspect.getmro(options)[-2::-1]  # type: ignore[arg-type]  # without `object`
        init.__doc__ = "\n".join(inspect.cleandoc(c.__doc__) for c in bases if c.__doc__)
        vars(init).update(__signature__=Signature([*own, *its.values()]), options_type=options)
        return init

    return decorate


class LossModule(nn.Module):
    """A subclass decorates its `__init__` with `takes` and defines `compute`, whose arguments after the options are
    those of `forward`."""

    options_type: ClassVar[Any]
    option_names: ClassVar[tuple[str, ...]]

    @classmethod
    def compute(cls, options: Any, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"{cls.__name__} does not define compute.")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        own = vars(cls)
        if options_type := getattr(own.get("__init__"), "options_type", None):
            cls.options_type = options_type
            cls.option_names = tuple(inspect.signature(options_type).parameters)
        if "compute" in own and "forward" not in own:
            cls.forward = _forward(cls)

    def chosen(self) -> dict[str, Any]:
        """The options as they stand in the attributes: read at every call, so that a changed one takes effect."""
        return {name: getattr(self, name) for name in self.option_names}

    def options(self) -> Any:
        return self.options_type(**self.chosen())

    def extra_repr(self) -> str:
        chosen = self.chosen().items()
        return ", ".join(f"{k}={v!r}" for k, v in chosen if not isinstance(v, torch.Tensor))

    if TYPE_CHECKING:  # the attributes are the options, of any type

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...


def _forward(cls: type[LossModule]) -> Callable[..., Any]:
    def forward(self: LossModule, *args: Any, **kwargs: Any) -> Any:
        return self.compute(self.options(), *args, **kwargs)

    signature = inspect.signature(cls.compute)
    parameters = [Parameter("self", Parameter.POSITIONAL_OR_KEYWORD), *_tensors(cls).values()]
    return _described(forward, cls, cls, signature.replace(parameters=parameters))


def _tensors(cls: type[LossModule]) -> dict[str, Parameter]:
    """The arguments of `forward`."""
    parameters = dict(inspect.signature(cls.compute).parameters)
    del parameters["options"]
    return parameters


def _described(
    function: Callable[..., Any], cls: type, loss: type[LossModule], signature: Signature
) -> Callable[..., Any]:
    function.__doc__ = inspect.getdoc(loss.compute)
    function.__module__ = cls.__module__
    function.__qualname__ = f"{cls.__qualname__}.{function.__name__}"
    vars(function)["__signature__"] = signature
    return function


class LossFunction:
    """`apply` is a `LossModule` as a function, its arguments in the order of the incumbent.

    A subclass names the module in its class statement: `class F(LossFunction, loss=M)`. The arguments are those of the
    module's `forward`, then its options; `first` are required and stand in front, `last` at the end. Any other keyword
    is the default of an option that differs from the module's. `forward`, whose parameters some look at, is `apply`
    behind a context that nobody needs.
    """

    apply: ClassVar[Callable[..., Any]]
    forward: ClassVar[Callable[..., Any]]

    def __init_subclass__(
        cls,
        loss: type[LossModule] | None = None,
        first: str = "_input lin_weight target",
        last: str = "",
        **defaults: Any,
    ) -> None:
        super().__init_subclass__()
        if loss is not None:
            cls.apply = staticmethod(_apply(cls, loss, first.split(), last.split(), defaults))
            cls.forward = staticmethod(_with_context(cls, loss))
            return
        unread = [n for n in vars(cls) if n in ("forward", "backward") or n.endswith("_loss_fn")]
        if unread:
            raise TypeError(
                f"{cls.__name__} defines {', '.join(unread)}, which {cls.__mro__[1].__name__} would not call: it has "
                f"no steps to replace. Derive from LigerFusedLinearPreferenceBase, ...UnpairedPreferenceBase, "
                f"...DistillationBase or ...PPOBase of liger_kernel.chunked_loss."
            )


def _apply(
    cls: type,
    loss: type[LossModule],
    first: list[str],
    last: list[str],
    defaults: dict[str, Any],
) -> Callable[..., Any]:
    known = {**_tensors(loss), **inspect.signature(loss.options_type).parameters}
    if unknown := {*first, *last, *defaults} - known.keys():
        raise TypeError(f"{cls.__name__}: {loss.__name__} has no argument {sorted(unknown)}.")
    known |= {name: known[name].replace(default=Parameter.empty) for name in first}
    known |= {name: known[name].replace(default=value) for name, value in defaults.items()}
    order = [*first, *(name for name in known if name not in (*first, *last)), *last]
    # modules call the weight of the head by another name
    names = {name: "weight" if name == "lin_weight" else name for name in order}
    parameters = [known[name].replace(name=names[name]) for name in order]
    # a dataclass binds arguments as a function with this signature does, under torch.compile too
    Arguments = make_dataclass(
        f"{cls.__name__}.apply",
        [
            (p.name, p.annotation, *((p.default,) if p.default is not p.empty else ()))
            for p in parameters
        ],
    )

    def apply(*args: Any, **kwargs: Any) -> Any:
        bound = Arguments(*args, **kwargs)
        given = {name: getattr(bound, called) for name, called in names.items()}
        options = loss.options_type(**{name: given.pop(name) for name in loss.option_names})
        return loss.compute(options, **given)

    returned = inspect.signature(loss.compute).return_annotation
    return _described(apply, cls, loss, Signature(parameters, return_annotation=returned))


def _with_context(cls: type[LossFunction], loss: type[LossModule]) -> Callable[..., Any]:
    def forward(ctx: Any, *args: Any, **kwargs: Any) -> Any:
        return cls.apply(*args, **kwargs)

    signature = inspect.signature(cls.apply)
    parameters = [Parameter("ctx", Parameter.POSITIONAL_OR_KEYWORD), *signature.parameters.values()]
    return _described(forward, cls, loss, signature.replace(parameters=parameters))
