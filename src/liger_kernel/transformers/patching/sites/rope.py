"""Rotary embedding: the function an attention module calls by a global name, replaced for that module alone.

HF's attention calls `apply_rotary_pos_emb`, a global of its modeling file. To leave every other model in the process
untouched, the attention instance runs its class' forward code over a copy of those globals in which that one name is
ours. Where one of the globals that this code names has changed since, the copy is made, and the function proven, anew.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from liger_kernel.ops import qk_norm_rope as qk_norm_rope_op
from liger_kernel.ops import rope as rope_op
from liger_kernel.transformers.patching import proof, unnormed
from liger_kernel.transformers.patching.facts import kept
from liger_kernel.transformers.patching.linears import maps_features
from liger_kernel.transformers.patching.options import Option
from liger_kernel.transformers.patching.plans import Method, MethodPlan, call, marker, ours_runs
from liger_kernel.transformers.patching.site import Site, modules
from liger_kernel.transformers.patching.sites.norms import NormPlan, twin_of
from liger_kernel.transformers.patching.unnormed import Unnormed, running
from liger_kernel.transformers.patching.waiting import real


@dataclass(frozen=True)
class Form:
    """How our `rope` computes a rotary function of a modeling file."""

    interleaved: bool = False
    #: what cos holds of the angles a: "twice" (a, a), "pairs" (a0, a0, a1, a1, ..) or "once" (a); or "complex": both
    angles: str = "twice"
    unpaired: bool = False  # neighbours are sorted into halves first, and stay there (DeepSeek)
    keys: bool = True  # f(q, k, cos, sin), or f(x, cos, sin)
    #: (S, H, D) with cos (S, R), as in vision towers, or (B, ., ., D) with cos (B, S, R); if complex, (B, S, H, D) with
    #: (S, 1, R)
    flat: bool = False
    heads: int = 1  # the dimension of the heads, unless a call says another
    sections: bool = (
        False  # cos (3, B, S, R), and one more argument selects: f(q, k, cos, sin, mrope_section)
    )
    narrow: str = ""  # proven for cos narrower than the heads, too: the "first" or "last" columns

    @functools.cached_property
    def n_heads(self) -> int:
        """How many of the arguments have heads."""
        return 1 + self.keys

    @functools.cached_property
    def n_tensors(self) -> int:
        return self.n_heads + (1 if self.angles == "complex" else 2)

    def takes(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether this is a call of the proven form."""
        n_tensors = self.n_tensors
        if len(args) != n_tensors + self.sections:
            return False
        for t in args[:n_tensors]:
            if not isinstance(t, Tensor):
                return False
        q, cos, is_complex = args[0], args[self.n_heads], self.angles == "complex"
        known = kwargs.keys() <= (set() if self.flat or is_complex else {"unsqueeze_dim"})
        whole = cos.shape[-1] * (1 if self.angles in ("twice", "pairs") else 2) == q.shape[-1]
        dims = (3, 2) if self.flat and not is_complex else (4, 3 + self.sections)
        more = args[n_tensors:]
        selects = not more or (isinstance(more[0], list) and 2 * sum(more[0]) == cos.shape[-1])
        return bool(
            known
            and (whole or self.narrow)
            and selects
            and (q.ndim, cos.ndim) == dims
            and cos.is_complex() == is_complex
            and (cos.shape[1] == 1 or not (self.flat and is_complex))
            and not cos.requires_grad
        )

    def compute(
        self, *args: Any, unsqueeze_dim: int = 0, rotate: Callable[..., Any] | None = None
    ) -> Any:
        """By `rotate`, which is called as the op is."""
        heads, angles, more = args[: self.n_heads], args[self.n_heads :], ()
        if self.sections:
            angles, more = angles[:2], angles[2:]
        unsqueeze_dim = unsqueeze_dim or self.heads
        if self.angles == "complex":
            freqs = angles[0].squeeze(1) if self.flat else angles[0]
            return rope_op.complex_rope(heads[0], heads[1], freqs, unsqueeze_dim)
        cos, sin = angles
        rotary_dim = cos.shape[-1] * (2 if self.angles == "once" else 1)
        if self.narrow == "last" and rotary_dim < heads[0].shape[-1]:
            parts = [x.split((x.shape[-1] - rotary_dim, rotary_dim), -1) for x in heads]
            turned = self.compute(
                *(x for _, x in parts), *args[self.n_heads :], unsqueeze_dim=unsqueeze_dim
            )
            pairs = zip(parts, turned if self.keys else (turned,), strict=True)
            joined = tuple(torch.cat((still, x), -1) for (still, _), x in pairs)
            return joined if self.keys else joined[0]
        if self.interleaved and self.angles == "twice":  # the op reads one half of a wide table
            cos, sin = cos[..., : rotary_dim // 2], sin[..., : rotary_dim // 2]
        if self.unpaired:
            heads = tuple(map(_unpaired, heads))
        if self.flat:
            heads, unsqueeze_dim = tuple(x[None] for x in heads), 2
        q, k = heads if self.keys else (*heads, None)
        rotate = rotate or rope_op.rope
        q, k = rotate(q, k, cos, sin, unsqueeze_dim, rotary_dim, self.interleaved, *more)
        if self.flat:
            q, k = q[0], None if k is None else k[0]
        return (q, k) if self.keys else q

    def norm_and_compute(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], original: Callable[..., Any]
    ) -> Any:
        """`compute` of heads that are not normed yet; None where one op does not compute both."""
        heads, angles = args[: self.n_heads], args[self.n_heads :]
        at = kwargs.get("unsqueeze_dim", self.heads)
        raw = angles
        for x in reversed(heads):
            if type(x) is not Unnormed or not x.may_wait():
                return None
            if x.norm != heads[-1].norm or x.heads not in (None, at):
                return None
            raw = (x.raw, *raw)
        if (
            not self.takes(raw, kwargs)
            or self.flat
            or self.unpaired
            or self.sections
            or self.angles == "complex"
            or self.narrow == "last"
        ):
            return None
        norm = heads[0].norm
        options = (norm.eps, norm.offset, norm.casting_mode)

        def rotate(q: Tensor, k: Tensor | None, cos: Tensor, sin: Tensor, *how: Any) -> Any:
            weights = (heads[0].weight, heads[1].weight if self.keys else None)
            return qk_norm_rope_op.qk_norm_rope(q, k, *weights, cos, sin, *options, *how)

        if running.fused is None:
            return self.compute(*raw, **kwargs, rotate=rotate)
        theirs = original(*real(args), **kwargs)  # first: angles of a wrong width are not our fault
        with proof.of_ours():
            found = self.compute(*raw, **kwargs, rotate=rotate)
            right = proof.within(*((x if self.keys else (x,)) for x in (found, theirs)))
        running.fused += ((x.module, right) for x in heads)
        return found


def _unpaired(x: Tensor) -> Tensor:
    """Columns 0, 2, 4, .. then 1, 3, 5, .."""
    return x.unflatten(-1, (-1, 2)).transpose(-1, -2).flatten(-2)


_FORMS = (
    Form(),
    Form(interleaved=True, angles="pairs"),
    Form(interleaved=True, angles="twice"),
    Form(unpaired=True),
    Form(angles="once"),
    Form(keys=False),
    Form(interleaved=True, angles="once", keys=False),
    Form(angles="complex"),
    Form(angles="complex", heads=2),
    Form(sections=True),
    Form(interleaved=True, sections=True),
)


@kept
def prove(original: Callable[..., Any]) -> tuple[Form, ...] | str:
    """The call forms of a rotary function that our `rope` computes, or why there is none."""
    found: list[Form] = []
    verdicts: list[bool | str] = []

    def agrees(form: Form, rotary_dim: int) -> bool:
        try:
            verdicts.append(_agrees(original, form, rotary_dim))
        except proof.CannotRunAlone as error:
            verdicts.append(f"its rotary function cannot be run alone: {error}")
        return verdicts[-1] is True

    with proof.sandbox():
        for flat in (False, True):
            forms = (replace(f, flat=flat) for f in _FORMS if not (flat and f.sections))
            form = next((f for f in forms if agrees(f, 16)), None)
            if form is not None:
                narrow = (replace(form, narrow=where) for where in ("first", "last"))
                found.append(next((f for f in narrow if agrees(f, 8)), form))
    if isinstance(verdicts[0], str) and not any(isinstance(v, bool) for v in verdicts):
        return verdicts[0]
    return tuple(found) or "its rotary function computes something else"


def _agrees(original: Callable[..., Any], form: Form, rotary_dim: int) -> bool:
    generator = torch.Generator().manual_seed(0)
    shapes: tuple[tuple[int, tuple[int, ...]], ...] = ((1, (2, 3, 5, 16)), (2, (2, 5, 3, 16)))
    if form.angles == "complex":  # nobody says where the heads are
        shapes = ((form.heads, shapes[form.heads - 1][1]),)
    elif form.flat:
        shapes = ((2, (5, 3, 16)),)
    ok = True
    for unsqueeze_dim, shape in shapes:
        heads = [torch.randn(shape, generator=generator) for _ in range(form.n_heads)]
        of_sequence: tuple[int, ...] = () if form.flat else (*(3,) * form.sections, 2)
        once = torch.randn(*of_sequence, 5, rotary_dim // 2, generator=generator)
        twice, pairs = torch.cat((once, once), -1), once.repeat_interleave(2, -1)
        table = {"twice": twice, "pairs": pairs}.get(form.angles, once)
        tables: tuple[Tensor, ...] = (table.cos(), table.sin())
        if form.angles == "complex":
            tables = (torch.complex(*tables),)
            tables = (tables[0][:, None] if form.flat else tables[0],)
        said = form.heads != unsqueeze_dim and not form.flat
        extra = {"unsqueeze_dim": unsqueeze_dim} if said else {}
        sections = [rotary_dim // 4, rotary_dim // 8, rotary_dim // 8]
        more = (sections,) if form.sections else ()
        theirs, ours = (_on_heads(f, tables, more, extra) for f in (original, form.compute))
        ok = ok and proof.Theirs(theirs, nn.Module(), heads).agrees(ours)
    return ok


def _on_heads(function: Callable[..., Any], tables: Any, more: Any, extra: dict[str, int]) -> Any:
    """As the code of a module (which there is not) that takes the heads."""

    def call(_: nn.Module, *heads: Tensor) -> Any:
        wide = (
            t.to(torch.promote_types(heads[0].dtype, torch.complex64))
            if t.is_complex()
            else t.to(heads[0].dtype)
            for t in tables
        )
        return function(*heads, *wide, *more, **extra)

    return call


def replacement(original: Callable[..., Any]) -> Callable[..., Any] | None:
    """A function with the signature of `original` that computes the proven call forms by our op, or None."""
    forms = prove(original)
    if isinstance(forms, str):
        return None

    required = [
        p.name for p in inspect.signature(original).parameters.values() if p.default is p.empty
    ]

    @functools.wraps(original)
    def liger_rope(*args: Any, **kwargs: Any) -> Any:
        while len(args) < len(required) and required[len(args)] in kwargs:
            args = (*args, kwargs.pop(required[len(args)]))
        if Unnormed in map(type, args):
            for form in forms:
                found = form.norm_and_compute(args, kwargs, original)
                if found is not None:
                    return found
            args = real(args)
        for form in forms if ours_runs() else ():
            if form.takes(args, kwargs):
                return form.compute(*args, **kwargs)
        return original(*args, **kwargs)

    return liger_rope


@kept
def _rebound(forward: Any) -> types.FunctionType | None:
    """`forward` over globals in which its rotary function is ours; None if it calls none that is proven."""
    inner = getattr(forward, "__wrapped__", None)
    if isinstance(inner, types.FunctionType):
        rebound = _rebound(inner)
        return None if rebound is None else _rewrapped(forward, inner, rebound)
    ours = {name: replacement(f) for name, f in rotary_functions(forward).items()}
    overlay = {name: function for name, function in ours.items() if function is not None}
    if not overlay:
        return None
    # torch.compile reads the globals of a function through the module that they name
    name = f"_liger_{forward.__module__}_{forward.__qualname__}".replace(".", "_")
    module = sys.modules[name] = types.ModuleType(name)
    vars(module).update(forward.__globals__, **overlay, __name__=name)
    made = types.FunctionType(
        forward.__code__, vars(module), forward.__name__, forward.__defaults__, forward.__closure__
    )
    made.__kwdefaults__ = forward.__kwdefaults__
    functools.update_wrapper(made, forward)
    return made


def _rewrapped(
    wrapper: types.FunctionType, inner: types.FunctionType, rebound: types.FunctionType
) -> types.FunctionType | None:
    """What a decorator made of `inner`, around `rebound` instead; None if its closure does not hold `inner`."""
    cells = wrapper.__closure__ or ()
    closure = tuple(types.CellType(rebound) if c.cell_contents is inner else c for c in cells)
    if closure == cells:
        return None
    made = types.FunctionType(
        wrapper.__code__, wrapper.__globals__, wrapper.__name__, wrapper.__defaults__, closure
    )
    made.__kwdefaults__ = wrapper.__kwdefaults__
    functools.update_wrapper(made, rebound)
    return made


@dataclass(frozen=True)
class RopePlan(MethodPlan):
    """The forward of an attention module over globals with our rotary function.

    `norms` are children that leave the norm of heads to the rotation.
    """

    kind = "rope"

    norms: tuple[str, ...] = ()

    @property
    def label(self) -> str:
        return "LigerRope"

    def __str__(self) -> str:
        return f"liger rope with {', '.join(self.norms)}" if self.norms else "liger rope"

    def call(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        forward: Any = type(module).forward
        forward = _rebound(forward) or forward
        children = module.__dict__["_modules"]
        norms = tuple(map(children.get, self.norms))
        return unnormed.run(norms, forward, module, *args, **kwargs)


class _Drawn(nn.Module):
    """In the place of a Linear: as many columns, at random."""

    def __init__(self, out_features: int):
        super().__init__()
        self.out_features = out_features

    def forward(self, x: Tensor) -> Tensor:
        return torch.randn(*x.shape[:-1], self.out_features, dtype=x.dtype)


def _waiting_norms(module: nn.Module) -> tuple[str, ...]:
    """The norms of an attention module whose heads its forward hands on to the rotary function, and to nobody else.

    Its own code runs on a clone with random heads, in float64; what comes after the rotation may fail.
    """
    plans = {n: c.__dict__.get(marker("norm")) for n, c in module._modules.items() if c is not None}
    norms = {n: p for n, p in plans.items() if isinstance(p, NormPlan) and p.can_wait}
    if not norms:
        return ()
    children: dict[str, nn.Module] = {}
    for name, child in module._modules.items():
        if name in norms and child is not None:
            twin = children[name] = twin_of(child, torch.float64, torch.float64)
            twin.__dict__["forward"] = Method(call, twin, "norm")
        elif maps_features(child):
            children[name] = _Drawn(child.out_features)  # type: ignore[union-attr, arg-type]
    clone = proof.clone(module, {}, children)
    names = [p.name for p in inspect.signature(type(module).forward).parameters.values()][1:]
    head_dim = getattr(module, "head_dim", 0)
    with proof.sandbox(), proof.InFloat64():
        for width in (head_dim, head_dim // 2, head_dim // 4):
            fused = _fused_on(clone, names, width, tuple(norms))
            if fused:
                right = {m for m, agrees in fused if agrees} - {
                    m for m, agrees in fused if not agrees
                }
                return tuple(n for n in norms if clone._modules[n] in right)
    return ()


def _fused_on(
    clone: nn.Module, names: list[str], width: int, norms: tuple[str, ...]
) -> list[tuple[nn.Module, bool]]:
    """What was fused in a forward of two tokens with angles of that width."""
    # the same for all columns: nobody has to know which of them form a pair
    angles = torch.randn(1, 2, 1, dtype=torch.float64).repeat(1, 1, width)
    known = {
        "hidden_states": torch.randn(1, 2, 8, dtype=torch.float64),
        "position_embeddings": (angles.cos(), angles.sin()),
        "position_ids": torch.arange(2)[None],
    }
    skipped = ("args", "kwargs")
    found: list[tuple[nn.Module, bool]] = []
    running.fused = found
    try:
        # what comes after the rotation may fail
        proof.ends(
            RopePlan(norms).call, clone, **{n: known.get(n) for n in names if n not in skipped}
        )
    finally:
        running.fused = None
    return found


def rotary_functions(forward: Any) -> dict[str, Any]:
    """What the function within all decorators calls by a global name with `rot` in it."""
    forward = inspect.unwrap(forward)
    code, known = getattr(forward, "__code__", None), getattr(forward, "__globals__", {})
    named = {n: known.get(n) for n in (code.co_names if code else ()) if "rot" in n}
    return {n: f for n, f in named.items() if callable(f) and not isinstance(f, type)}


def find_plan(module: nn.Module) -> RopePlan | str:
    forward: Any = type(module).forward
    if _rebound(forward) is not None:
        return RopePlan(_waiting_norms(module))
    reasons = {why for f in rotary_functions(forward).values() if isinstance(why := prove(f), str)}
    return ", ".join(sorted(reasons)) or "a decorator hides its rotary function"


SITE = Site(
    options=(Option("rope", True, "rotary functions of attention modules."),),
    kind="rope",
    candidates=modules(lambda module: rotary_functions(type(module).forward)),
    prove=lambda module, state: find_plan(module),
)
