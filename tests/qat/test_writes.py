"""A write to a quantized weight inside a step reaches the master as with autograd's estimator, or stops the run.

The reference is the same model whose layers apply the straight-through function themselves (``by_hand``): there a
parameter is its master, whoever looks.

| kind of write | training_step | manual, after the optimizer | forward of a submodule | validation_step |
|---|---|---|---|---|
| ``EXACT``: momentum encoders, targets, clipping, by hand, init, ... | exact | exact | exact | exact |
| ``max_norm`` of Embedding and EmbeddingBag | exact | exact | exact | exact |
| inside ``masters`` | exact | exact | exact | exact |
| ``LOST``: computed from a number in Python, or through what is not known | error | error | error | error |
| in compiled code, or beside it | error | error | error | error |
| that begins after the steps that are followed | error | error | error | error |
"""

import copy
import ctypes
import pickle
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import LambdaCallback
from support.models import batches, quiet_trainer
from support.straight_through import StraightThrough, quantized
from torch import Tensor, nn
from torch.func import grad, vmap
from torch.nn import functional as F
from torch.nn.utils import parameters_to_vector, vector_to_parameters
from torch.optim.swa_utils import get_ema_multi_avg_fn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import q8lightning
from q8lightning import LostWriteError, QATConfig, QuantizationCallback, WeightRule
from q8lightning.qat.writes.follow import COMPARED_FIRST

QAT = QATConfig([WeightRule(codebook="int4", block_size=32)])
NOT_FOLLOWED = replace(QAT, follow_steps=0)
SIZE = 16


class Layer(nn.Linear):
    """A layer that quantizes by hand, if it is told to."""

    by_hand = False

    def forward(self, x: Tensor) -> Tensor:
        weight = StraightThrough.apply(self.weight, "int4", 32) if self.by_hand else self.weight
        return F.linear(x, weight, self.bias)


class Pair(nn.Module):
    """A student, its target, which needs no gradient, and what kinds of writes keep."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Sequential(Layer(SIZE, SIZE), Layer(SIZE, SIZE))
        self.k = copy.deepcopy(self.q).requires_grad_(False)
        self.register_buffer("u", torch.ones(SIZE))
        for parameter in self.parameters():
            parameter.data.normal_()

    def parameters_of_both(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        return list(zip(self.q.parameters(), self.k.parameters(), strict=True))


Write = Callable[[Pair], None]
EXACT: dict[str, Write] = {}


def exact(write: Write) -> Write:
    EXACT[write.__name__] = write
    return write


@exact
@torch.no_grad()
def moco(pair: Pair) -> None:
    for q, k in pair.parameters_of_both():
        k.mul_(0.9).add_(q, alpha=0.1)


@exact
def moco_as_published(pair: Pair) -> None:
    for q, k in pair.parameters_of_both():
        k.data = k.data * 0.9 + q.data * (1.0 - 0.9)


@exact
def byol(pair: Pair) -> None:
    for q, k in pair.parameters_of_both():
        k.data.mul_(0.9).add_((1 - 0.9) * q.detach().data)


@exact
def deep_q(pair: Pair) -> None:
    for q, k in pair.parameters_of_both():
        k.data.copy_(0.1 * q.data + (1 - 0.1) * k.data)


@exact
@torch.no_grad()
def lerp(pair: Pair) -> None:
    for q, k in pair.parameters_of_both():
        k.lerp_(q, 0.1)


@exact
@torch.no_grad()
def foreach(pair: Pair) -> None:
    torch._foreach_mul_(list(pair.k.parameters()), 0.9)
    torch._foreach_add_(list(pair.k.parameters()), list(pair.q.parameters()), alpha=0.1)
    torch._foreach_lerp_([k.data for k in pair.k.parameters()], list(pair.q.parameters()), 0.1)


@exact
def multi_average(pair: Pair) -> None:
    get_ema_multi_avg_fn(0.9)(list(pair.k.parameters()), list(pair.q.parameters()), 1)


@exact
@torch.no_grad()
def through_state_dicts(pair: Pair) -> None:
    for k, q in zip(pair.k.state_dict().values(), pair.q.state_dict().values(), strict=True):
        k.copy_(0.9 * k + 0.1 * q)


@exact
def hard_update(pair: Pair) -> None:
    pair.k.load_state_dict(pair.q.state_dict())


@exact
def vectors(pair: Pair) -> None:
    old, new = parameters_to_vector(pair.k.parameters()), parameters_to_vector(pair.q.parameters())
    vector_to_parameters(0.9 * old + 0.1 * new, pair.k.parameters())


@exact
def clipping(pair: Pair) -> None:
    for q in pair.q.parameters():
        q.data.clamp_(-0.8, 0.8)


@exact
@torch.no_grad()
def clipping_without_data(pair: Pair) -> None:
    for q in pair.q.parameters():
        q.clamp_(-0.8, 0.8)
        q.copy_(q.clamp(-0.7, 0.7))


@exact
@torch.no_grad()
def by_hand(pair: Pair) -> None:
    for q in pair.q.parameters():
        q -= 0.1 * (torch.ones_like(q) + 0.01 * q)
        q.sub_(0.01)
        q.data -= 0.01 * q.data
        q.data.add_(torch.sin(q.detach()), alpha=0.01)


@exact
def initialization(pair: Pair) -> None:
    nn.init.orthogonal_(pair.k[0].weight)
    nn.init.normal_(pair.k[1].weight, std=0.3)
    nn.init.kaiming_uniform_(pair.q[1].weight)


@exact
@torch.no_grad()
def noise(pair: Pair) -> None:
    pair.q[0].weight.add_(torch.randn_like(pair.q[0].weight) * 0.01)
    pair.q[1].weight.add_(F.dropout(pair.q[1].weight, 0.5))


@exact
@torch.no_grad()
def parts(pair: Pair) -> None:
    pair.k[0].weight[2:4] = pair.q[0].weight[1:3]
    pair.k[0].weight[0].fill_(0.3)
    pair.k[1].weight.view(-1)[5:9].mul_(2)
    pair.k[1].weight.t()[3] += pair.k[0].weight[3]
    torch.add(pair.q[0].weight, 0.1, out=pair.q[0].weight)
    torch.ops.aten.mul_(pair.q[1].weight, 0.9)
    pair.q[1].weight.masked_fill_(pair.q[1].weight.abs() < 0.1, 0)


@exact
@torch.no_grad()
def prototypes(pair: Pair) -> None:
    """SwAV keeps its prototypes on the sphere."""
    w = pair.q[0].weight.data.clone()
    w = F.normalize(w, dim=1, p=2)
    pair.q[0].weight.copy_(w)
    norms = pair.q[1].weight.norm(dim=1, keepdim=True)
    pair.q[1].weight.mul_(norms.clamp(max=2.0) / norms)


@exact
@torch.no_grad()
def spectral(pair: Pair) -> None:
    w = pair.q[0].weight
    v = F.normalize(w.t() @ pair.u, dim=0)
    u = F.normalize(w @ v, dim=0)
    w.div_(u @ w @ v)
    w.mul_(1.5)


@exact
@torch.no_grad()
def orthogonal(pair: Pair) -> None:
    w = pair.q[0].weight.data / 20
    for _ in range(2):
        w = 1.5 * w - 0.5 * w @ w.T @ w
    pair.q[0].weight.data = w


@exact
@torch.no_grad()
def there_and_back(pair: Pair) -> None:
    """SAM, Lookahead, Reptile: perturb, compute, restore."""
    old = [q.data.clone() for q in pair.q.parameters()]
    for q in pair.q.parameters():
        q.add_(0.1 * torch.sign(q))
    pair.k(torch.ones(2, SIZE, device=pair.k[0].weight.device))
    for q, before in zip(pair.q.parameters(), old, strict=True):
        q.data = before
        q.mul_(0.99)


@exact
@torch.no_grad()
def read_at_an_address(pair: Pair) -> None:
    """A write as by a kernel of the user's."""
    for q, k in pair.parameters_of_both():
        k.mul_(0.9).add_(q, alpha=0.1)
    pointer = ctypes.cast(pair.k[0].weight.data_ptr(), ctypes.POINTER(ctypes.c_float))
    shown = torch.tensor(pointer[: SIZE * SIZE]).view(SIZE, SIZE)
    with q8lightning.masters(pair):
        value = pair.k[0].weight
        expected = value if pair.k[0].by_hand else quantized(value, "int4", 32)
        assert torch.equal(shown, expected)


@exact
def swapped(pair: Pair) -> None:
    """Temporaries change places with the weights."""
    for q, k in pair.parameters_of_both():
        q.data, k.data = k.data, q.data


class Writer(pl.LightningModule):
    """Trains a student towards its target and writes to both; ``where`` says in which place."""

    def __init__(self, write: Write, where: str = "training", by_hand: bool = False, after: bool = False) -> None:
        super().__init__()
        self.net, self.write, self.where, self.after = Pair(), write, where, after
        self.automatic_optimization = where != "manual"
        if where == "forward":
            self.net.q[0].register_forward_pre_hook(lambda *_: self.write(self.net))
        for each in self.net.modules():
            if isinstance(each, Layer):
                each.by_hand = by_hand
        self.seen: list[float] = []

    def maybe(self, where: str) -> None:
        if where == self.where:
            self.write(self.net)

    def loss(self, batch: Tensor) -> Tensor:
        with torch.no_grad():
            target = self.net.k(batch)
        loss = (self.net.q(batch) - target).square().mean()
        self.seen.append(loss.item())
        return loss

    def training_step(self, batch: Tensor, index: int) -> Tensor | None:
        if not self.after:
            self.maybe("training")
        loss = self.loss(batch)
        if self.after:
            self.maybe("training")
        if self.automatic_optimization:
            return loss
        optimizer: Any = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(loss)
        optimizer.step()
        self.maybe("manual")
        self.loss(batch)
        return None

    def validation_step(self, batch: Tensor, index: int) -> None:
        self.maybe("validation")
        self.loss(batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.net.q.parameters(), lr=0.01)


def train(folder: Path, model: Writer, *callbacks: pl.Callback, **options: Any) -> Any:
    options = {"max_steps": 3, "limit_val_batches": 1 if model.where == "validation" else 0} | options
    options["callbacks"] = [*callbacks, *options.get("callbacks", ())]
    torch.manual_seed(5)
    trainer = quiet_trainer(folder, val_check_interval=1, **options)
    trainer.fit(model, batches(6, SIZE), batches(2, SIZE))
    return model.seen, [value.clone() for value in model.net.state_dict().values()]


def check(folder: Path, write: Write, where: str, qat: QATConfig = QAT, after: bool = False, **options: Any) -> None:
    torch.manual_seed(3)
    model = Writer(write, where, after=after)
    reference = Writer(write, where, by_hand=True, after=after)
    reference.load_state_dict(model.state_dict())
    expected = train(folder, reference, **options)
    got = train(folder, model, QuantizationCallback(None, qat=qat), **options)
    assert got[0] == expected[0]
    assert all(map(torch.equal, got[1], expected[1]))


@pytest.mark.parametrize("where", ["training", "manual", "forward", "validation"])
@pytest.mark.parametrize("kind", EXACT)
def test_a_write_reaches_the_master(kind: str, where: str, tmp_path: Path) -> None:
    check(tmp_path, EXACT[kind], where)


@pytest.mark.parametrize("kind", ["moco", "moco_as_published", "deep_q", "clipping", "foreach", "hard_update"])
def test_backward_uses_what_forward_used_before_the_write(kind: str, tmp_path: Path) -> None:
    check(tmp_path, EXACT[kind], "training", after=True)


@pytest.mark.parametrize("kind", ["moco", "vectors", "by_hand"])
@pytest.mark.parametrize(
    "options",
    [
        {"accumulate_grad_batches": 2},
        {"precision": "bf16-true"},
        {"precision": "64-true"},
        {"precision": "bf16-mixed"},
        {"callbacks": [LambdaCallback(on_before_backward=lambda *_: None, on_after_backward=lambda *_: None)]},
    ],
    ids=["accumulated", "half", "double", "mixed", "hooks"],
)
def test_a_write_reaches_the_master_however_the_model_trains(
    options: dict[str, Any], kind: str, tmp_path: Path
) -> None:
    check(tmp_path, EXACT[kind], "training", **options)


def test_a_write_reaches_the_master_before_and_after_the_schedule_starts(tmp_path: Path) -> None:
    """Before it, a parameter is its master, and the reference is training in float."""
    rule = WeightRule(codebook="int4", block_size=32)
    torch.manual_seed(3)
    model, reference = Writer(moco), Writer(moco)
    reference.load_state_dict(model.state_dict())
    train(tmp_path, reference)
    train(tmp_path, model, QuantizationCallback(None, qat=QATConfig([rule], start_step=3)))
    assert all(map(torch.equal, model.state_dict().values(), reference.state_dict().values()))
    reference = copy.deepcopy(model)
    for each in reference.net.modules():
        if isinstance(each, Layer):
            each.by_hand = True
    train(tmp_path, reference)
    train(tmp_path, model, QuantizationCallback(None, qat=QAT))
    assert all(map(torch.equal, model.state_dict().values(), reference.state_dict().values()))


def test_a_write_in_a_ramp_follows_the_choice_of_blocks(tmp_path: Path) -> None:
    seen: list[tuple[Tensor, Tensor]] = []

    def write(pair: Pair) -> None:
        moco(pair)
        with torch.no_grad():
            pair.k(torch.ones(1, SIZE))
        shown = pair.k[0].weight.detach().clone()
        with q8lightning.masters(pair):
            seen.append((shown, pair.k[0].weight.detach().clone()))

    ramp = QATConfig([WeightRule(codebook="int4", block_size=32)], ramp=6)
    train(tmp_path, Writer(write), QuantizationCallback(None, qat=ramp))
    for shown, master in seen:
        blocks = zip(shown.view(-1, 32), master.view(-1, 32), quantized(master, "int4", 32).view(-1, 32), strict=True)
        assert all(torch.equal(a, b) or torch.equal(a, c) for a, b, c in blocks)
        assert not torch.equal(shown, master)


# What is renormalized in the forward pass


class Embeddings(pl.LightningModule):
    def __init__(self, kind: type[nn.Module], by_hand: bool = False, **options: Any) -> None:
        super().__init__()
        self.table = kind(12, SIZE, max_norm=1.0, **options)
        self.head, self.by_hand, self.seen = Layer(SIZE, SIZE), by_hand, []
        self.head.by_hand = by_hand

    def look_up(self, tokens: Tensor) -> Tensor:
        if not self.by_hand:
            return self.table(tokens)
        with torch.no_grad():
            torch.embedding_renorm_(self.table.weight, tokens.reshape(-1), 1.0, self.table.norm_type)
        weight = StraightThrough.apply(self.table.weight, "int4", 32)
        return (F.embedding_bag if isinstance(self.table, nn.EmbeddingBag) else F.embedding)(tokens, weight)

    def training_step(self, batch: Tensor, index: int) -> Tensor:
        tokens = torch.arange(8).view(2, 4) + index
        loss = self.head(self.look_up(tokens) + self.look_up(tokens.flip(0))).square().mean()
        self.seen.append(loss.item())
        return loss

    validation_step = training_step

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=5.0)


@pytest.mark.parametrize("followed", [True, False])
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize("norm_type", [2.0, 1.0])
def test_embeddings_renormalize_their_masters_and_look_up_quantized_rows(
    norm_type: float, kind: type[nn.Module], followed: bool, tmp_path: Path
) -> None:
    qat = QAT if followed else NOT_FOLLOWED
    torch.manual_seed(0)
    model = Embeddings(kind, norm_type=norm_type)
    reference = Embeddings(kind, by_hand=True, norm_type=norm_type)
    reference.load_state_dict(model.state_dict())
    for each, callbacks in ((reference, []), (model, [QuantizationCallback(None, qat=qat)])):
        trainer = quiet_trainer(tmp_path, max_steps=4, val_check_interval=2, callbacks=callbacks)
        trainer.fit(each, batches(4), batches(1))
    assert model.seen == reference.seen
    assert all(map(torch.equal, model.state_dict().values(), reference.state_dict().values()))
    assert model.table.max_norm == 1.0
    assert not model.table._forward_pre_hooks
    assert not model.table._forward_hooks


def test_an_embedding_keeps_its_max_norm_when_its_forward_raises(tmp_path: Path) -> None:
    class Raises(Embeddings):
        def training_step(self, batch: Tensor, index: int) -> Tensor:
            with pytest.raises(TypeError):
                self.table(torch.arange(3), 1, 2, 3, 4, 5)
            assert self.table.max_norm == 1.0
            return super().training_step(batch, index)

    quiet_trainer(tmp_path, max_steps=2, callbacks=[QuantizationCallback(None, qat=QAT)]).fit(
        Raises(nn.EmbeddingBag), batches(2)
    )


# What cannot reach the master


LOST: dict[str, tuple[Write, str]] = {}


def lost(why: str) -> Callable[[Write], Write]:
    def add(write: Write) -> Write:
        LOST[write.__name__] = write, why
        return write

    return add


@lost("read from quantized values")
@torch.no_grad()
def scaled_by_a_number(pair: Pair) -> None:
    pair.k[0].weight.mul_(1 / pair.k[0].weight.norm().item())


@lost("read from quantized values")
@torch.no_grad()
def through_numpy(pair: Pair) -> None:
    pair.k[0].weight.copy_(torch.from_numpy(pair.q[0].weight.detach().numpy() * 0.5))


@lost("what was written was computed from quantized values")
@torch.no_grad()
def kept_in_a_buffer(pair: Pair) -> None:
    pair.u[0] = pair.q[0].weight[0, 0]
    pair.k[0].weight[0].copy_(pair.u)


@lost("replaced by a parameter that was computed from quantized values")
def made_anew(pair: Pair) -> None:
    pair.k[0].weight = nn.Parameter(pair.k[0].weight * 0.5, requires_grad=False)


@lost("found only after the step")
def behind_torchs_back(pair: Pair) -> None:
    memory = pair.k[0].weight.detach().numpy()
    memory += 1


@lost("found only after the step")
def through_the_storage(pair: Pair) -> None:
    ctypes.memset(pair.k[0].weight.data_ptr(), 0, 4)


@pytest.mark.parametrize("where", ["training", "manual", "forward", "validation"])
@pytest.mark.parametrize("kind", LOST)
def test_a_write_that_cannot_reach_the_master_stops_the_run(kind: str, where: str, tmp_path: Path) -> None:
    write, why = LOST[kind]
    model = Writer(write, where)
    with pytest.raises(LostWriteError, match=rf"net\.k\.0\.weight.*{why}.*on_train_batch_end.*masters.*exclude"):
        train(tmp_path, model, QuantizationCallback(None, qat=QAT))
    if kind != "made_anew":
        assert not torch.equal(quantized(model.net.k[0].weight, "int4", 32), model.net.k[0].weight)


@pytest.mark.parametrize("where", ["training", "manual", "forward", "validation"])
@pytest.mark.parametrize("kind", ["moco", "moco_as_published", "clipping", "clipping_without_data", "deep_q"])
def test_a_write_that_begins_late_stops_the_run(kind: str, where: str, tmp_path: Path) -> None:
    """The step is neither followed, nor are all values compared after it."""
    calls = []

    def late(pair: Pair) -> None:
        calls.append(1)
        if len(calls) == COMPARED_FIRST + 1:
            EXACT[kind](pair)

    qat = replace(QAT, follow_steps=1)
    with pytest.raises(LostWriteError, match=r"net\.[qk]\.\d\.weight"):
        train(tmp_path, Writer(late, where), QuantizationCallback(None, qat=qat), max_steps=COMPARED_FIRST + 2)
    assert len(calls) == COMPARED_FIRST + 1


@pytest.mark.parametrize("where", ["training", "forward", "validation"])
@pytest.mark.parametrize("kind", ["moco", "moco_as_published", "clipping", "deep_q"])
def test_a_write_beside_or_in_compiled_code_stops_the_run(kind: str, where: str, tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = Writer(EXACT[kind], where)
    if where == "forward":
        model.net.q[0] = Inside(EXACT[kind], model.net)
    model.net.q.compile(backend="eager")
    with pytest.raises(LostWriteError, match=r"net\.[qk]\.\d\.\w*\.?weight"):
        train(tmp_path, model, QuantizationCallback(None, qat=QAT))


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("fresh", [True, False])
def test_a_write_beside_a_compiled_function_stops_the_run(fresh: bool, after: bool, tmp_path: Path) -> None:
    """Compiled code may have read a weight, or computed what is written, whether it was compiled now or before."""
    torch._dynamo.reset()
    function = torch.compile(lambda weight: torch.tanh(weight) * 2, backend="eager", fullgraph=True)

    def write(pair: Pair) -> None:
        moco(pair) if after else None
        function(pair.k[0].weight)
        None if after else moco(pair)

    for _ in range(1 if fresh else 2):
        with pytest.raises(LostWriteError, match=r"net\.k\.0\.weight.*compiled code"):
            train(tmp_path, Writer(write), QuantizationCallback(None, qat=QAT))


@pytest.mark.parametrize("where", ["training", "manual", "forward", "validation"])
@pytest.mark.parametrize("followed", [True, False])
@pytest.mark.parametrize("kind", ["moco", "vectors", "scaled_by_a_number", "by_hand"])
def test_inside_masters_everything_is_possible(kind: str, followed: bool, where: str, tmp_path: Path) -> None:
    write = EXACT[kind] if kind in EXACT else LOST[kind][0]

    def inside(pair: Pair) -> None:
        with q8lightning.masters(pair.k):
            write(pair)

    check(tmp_path, inside, where, QAT if followed else NOT_FOLLOWED)


class Inside(Layer):
    """A layer that writes in its own forward."""

    def __init__(self, write: Write, pair: Pair) -> None:
        super().__init__(SIZE, SIZE)
        self.held = [write, pair]  # in a list, as the pair holds this

    def forward(self, x: Tensor) -> Tensor:
        write, pair = self.held
        write(pair)
        return super().forward(x)


def test_a_part_that_is_copied_in_a_step_is_refused_unless_it_is_copied_with_the_masters(tmp_path: Path) -> None:
    def copied(pair: Pair) -> None:
        if not hasattr(pair, "target"):
            pair.target = copy.deepcopy(pair.q)

    def copied_with_masters(pair: Pair) -> None:
        with q8lightning.masters(pair):
            copied(pair)

    refused = pytest.raises(LostWriteError, match=r"net\.target\.0\.weight, net\.target\.1\.weight while")
    with pytest.warns(UserWarning, match="the model has changed"), refused:
        train(tmp_path, Writer(copied), QuantizationCallback(None, qat=QAT))
    model = Writer(copied_with_masters)
    with pytest.warns(UserWarning, match="new: net.target.0.weight"):
        train(tmp_path, model, QuantizationCallback(None, qat=QAT))
    assert not torch.equal(quantized(model.net.target[0].weight, "int4", 32), model.net.target[0].weight)


def test_an_embedding_with_max_norm_in_compiled_code_stops_the_run(tmp_path: Path) -> None:
    torch._dynamo.reset()
    model = Embeddings(nn.Embedding)
    model.compile(backend="eager")
    with pytest.raises(LostWriteError, match=r"table\.weight.*beside compiled code"):
        quiet_trainer(tmp_path, max_steps=2, callbacks=[QuantizationCallback(None, qat=QAT)]).fit(model, batches(2))


# What is no write


class Reader(Writer):
    """Reads weights in many ways, and keeps how deep the stack of modes was."""

    def __init__(self) -> None:
        super().__init__(lambda _: None)
        self.depths: list[int] = []
        self.read: list[Any] = []

    def checkpointed(self, batch: Tensor) -> Tensor:
        """Return a gradient through a checkpoint that keeps products of weights and computes the rest again."""
        keep = partial(create_selective_checkpoint_contexts, [torch.ops.aten.mul.Tensor])

        def twice(x: Tensor) -> Tensor:
            return F.linear(F.linear(x, self.net.q[0].weight * 2).relu(), self.net.q[1].weight * 3)

        x = batch.clone().requires_grad_()
        return torch.autograd.grad(checkpoint(twice, x, use_reentrant=False, context_fn=keep).square().sum(), x)[0]

    def training_step(self, batch: Tensor, index: int) -> Any:
        self.depths.append(torch._C._len_torch_function_stack())
        weight = self.net.q[0].weight
        with torch.no_grad():
            self.read += [weight.norm().item(), weight.data.abs().max(), (0.5 * weight).clone(), weight[0].tolist()]
            self.read += [F.linear(batch, weight), batch @ weight.T, F.dropout(weight), self.net.state_dict()]
            temporary = weight.clone()
            temporary.mul_(2)
            self.net.u.copy_(weight[0] + temporary[1])
            per_sample = vmap(grad(lambda w, x: F.linear(x, w).square().sum()), (None, 0))(weight, batch)
            self.read += [per_sample, temporary, self.net.u.clone(), copy.deepcopy(self.net.q[1]).weight]
            generator = torch.Generator().manual_seed(index)
            self.read += [torch.empty_like(weight).normal_(generator=generator)]
            self.read += [torch.bernoulli(weight.sigmoid(), generator=generator), generator.get_state()]
            with FlopCounterMode(display=False) as counter:
                self.read += [weight @ weight, counter.get_total_flops()]
        self.read.append(self.checkpointed(batch))
        return super().training_step(batch, index) + weight.square().sum() + (batch @ weight).sum()


def test_reading_is_the_same_in_steps_that_are_followed_and_in_others(
    tmp_path: Path,
) -> None:
    """Steps are followed no longer than they must be if nothing is written."""
    runs = []
    for followed in (0, 2, 100):
        torch.manual_seed(3)
        model = Reader()
        callback = QuantizationCallback(None, qat=replace(QAT, follow_steps=followed))
        runs.append((*train(tmp_path, model, callback, max_steps=4), model.read))
        assert model.depths == [int(step < followed) for step in range(4)]
        runs[-1] += (torch.get_rng_state(),)
    for other in runs[1:]:
        torch.testing.assert_close(other, runs[0], rtol=0, atol=0)


class Encoder(Writer):
    """Evaluates an encoder on padded input, where its fast path gives other values than the slow one."""

    def __init__(self) -> None:
        super().__init__(moco, "validation")
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(SIZE, 2, 32, batch_first=True), 1)

    def validation_step(self, batch: Tensor, index: int) -> None:
        padding = torch.tensor([[False, False, True, True]]).expand(2, 4)
        self.seen.append(self.encoder(batch.view(2, 4, SIZE), src_key_padding_mask=padding).square().mean().item())
        super().validation_step(batch, index)


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_attention_evaluates_on_its_fast_path_in_steps_that_are_followed(
    tmp_path: Path,
) -> None:
    """A later write in the same step reaches the master."""
    torch.manual_seed(3)
    model = Encoder()
    copies = [copy.deepcopy(model) for _ in range(2)]
    written, _ = train(tmp_path, model, QuantizationCallback(None, qat=QAT), max_steps=1)
    assert not torch.equal(model.net.k[0].weight, copies[0].net.k[0].weight)
    seen = []
    for each, qat in zip(copies, (NOT_FOLLOWED, QAT), strict=True):
        each.where = ""
        seen.append(train(tmp_path, each, QuantizationCallback(None, qat=qat), max_steps=1, limit_val_batches=1)[0])
    assert seen[0] == seen[1]
    assert written[1] == seen[0][1]


def test_from_the_first_write_on_every_step_is_followed(tmp_path: Path) -> None:
    calls = []

    def every_other(pair: Pair) -> None:
        calls.append(torch._C._len_torch_function_stack())
        if len(calls) % 2:
            moco(pair)

    train(tmp_path, Writer(every_other), QuantizationCallback(None, qat=replace(QAT, follow_steps=1)), max_steps=4)
    assert calls == [1, 1, 1, 1]


def test_a_parameter_that_is_not_quantized_takes_what_it_would_take_without_qat(tmp_path: Path) -> None:
    excluded = QATConfig([WeightRule(codebook="int4", block_size=32)], exclude=["net.k.*"])
    for kind in ("moco", "foreach", "by_hand", "deep_q"):
        torch.manual_seed(3)
        model, reference = Writer(EXACT[kind]), Writer(EXACT[kind], by_hand=True)
        for each in reference.net.k:
            each.by_hand = False
        reference.load_state_dict(model.state_dict())
        expected = train(tmp_path, reference)
        got = train(tmp_path, model, QuantizationCallback(None, qat=excluded))
        assert got[0] == expected[0]
        assert all(map(torch.equal, got[1], expected[1]))


def test_masters_does_nothing_where_there_is_nothing_to_do() -> None:
    pair = Pair()
    before = copy.deepcopy(pair.state_dict())
    with q8lightning.masters(pair), q8lightning.masters(pair.q):
        pass
    assert all(map(torch.equal, pair.state_dict().values(), before.values()))


def test_torch_is_as_it_was_after_the_run(tmp_path: Path) -> None:
    train(tmp_path, Writer(moco), QuantizationCallback(None, qat=QAT))
    with pytest.raises(LostWriteError):
        train(tmp_path, Writer(LOST["kept_in_a_buffer"][0]), QuantizationCallback(None, qat=QAT))
    assert "data" not in vars(nn.Parameter)
    assert torch._C._len_torch_function_stack() == 0


# Copies in the middle of a run


class Pickles(Writer):
    """Pickles what belongs to its run, in the middle of it."""

    def __init__(self, manual: bool) -> None:
        super().__init__(moco, "manual" if manual else "training")
        self.pickled: list[tuple[Any, ...]] = []

    def pickle(self) -> None:
        trainer, copies = self.trainer, self.pickled
        self.pickled = []  # do not pickle what was pickled
        loops = trainer.fit_loop, trainer.fit_loop.epoch_loop, trainer.validate_loop
        held = trainer.callbacks[0], trainer.precision_plugin, trainer.strategy, *loops, *trainer.optimizers, trainer
        copies.append(tuple(pickle.loads(pickle.dumps(each)) for each in held))
        copies.append(tuple(copy.deepcopy(each) for each in held[:2]))
        self.pickled = copies

    def training_step(self, batch: Tensor, index: int) -> Any:
        result = super().training_step(batch, index)
        self.pickle()
        return result

    def validation_step(self, batch: Tensor, index: int) -> None:
        super().validation_step(batch, index)
        self.pickle()

    def on_train_batch_end(self, *_: Any) -> None:
        self.pickle()


@pytest.mark.parametrize("manual", [False, True])
def test_what_a_run_holds_can_be_pickled_and_copied_in_the_middle_of_it(manual: bool, tmp_path: Path) -> None:
    model = Pickles(manual)
    train(tmp_path, model, QuantizationCallback(None, qat=QAT), max_steps=1, limit_val_batches=1)
    assert len(model.pickled) == 6
    for callback, plugin, *_ in model.pickled:
        assert callback.qat == QAT
        assert plugin.train_step_context.__func__ is type(plugin).train_step_context
    train(tmp_path, Writer(moco), callback, max_steps=1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("kind", [kind for kind in EXACT if kind != "read_at_an_address"])  # an address of the host
def test_a_write_reaches_the_master_on_a_gpu(kind: str, tmp_path: Path) -> None:
    check(tmp_path, EXACT[kind], "training", accelerator="gpu")
