import sys

import pytest
import torch

from megalm.errors import MegalmError
from megalm.optim import adamw
from megalm.optim.adamw import build_optimizer, resolve_implementation
from megalm.optim.config import OptimizerConfig

STEPS = 20
SHAPES = [(7, 5), (33,), (3,)]  # odd sizes, so that vectorised kernels run into their tails
DECAYS = [0.1, 0.0, 0.0]


def start() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=generator) for shape in SHAPES]


def gradients() -> list[list[torch.Tensor]]:
    """One list of gradients per step, of very different sizes."""
    generator = torch.Generator().manual_seed(1)
    return [[torch.randn(shape, generator=generator) * 10.0 ** (i - 1) for i, shape in enumerate(SHAPES)]] * 3 + [
        [torch.randn(shape, generator=generator) for shape in SHAPES] for _ in range(STEPS - 3)
    ]


def rates() -> list[float]:
    return [1e-2 * (step + 1) / STEPS for step in range(STEPS)]


def by_hand(config: OptimizerConfig, decoupled: bool = True) -> list[torch.Tensor]:
    """Loshchilov and Hutter 2019, algorithm 2, in fp64 (with the decay scaled by the rate, as everybody does)."""
    results = []
    for index, weight in enumerate(start()):
        theta = weight.double()
        m, v = torch.zeros_like(theta), torch.zeros_like(theta)
        for t, (step, rate) in enumerate(zip(gradients(), rates(), strict=True), start=1):
            gradient = step[index].double()
            if not decoupled:
                gradient = gradient + DECAYS[index] * theta
            m = config.beta1 * m + (1 - config.beta1) * gradient
            v = config.beta2 * v + (1 - config.beta2) * gradient**2
            m_hat, v_hat = m / (1 - config.beta1**t), v / (1 - config.beta2**t)
            update = m_hat / (v_hat.sqrt() + config.eps)
            if decoupled:
                update = update + DECAYS[index] * theta
            theta = theta - rate * update
        results.append(theta)
    return results


def trained(config: OptimizerConfig, offload: bool = False) -> list[torch.Tensor]:
    parameters = [torch.nn.Parameter(weight) for weight in start()]
    groups = [
        {"params": parameters[:1], "weight_decay": DECAYS[0]},
        {"params": parameters[1:], "weight_decay": DECAYS[1]},
    ]
    optimizer = build_optimizer(groups, config, "cpu", offload)
    for step, rate in zip(gradients(), rates(), strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        for parameter, gradient in zip(parameters, step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
    return [parameter.detach().double() for parameter in parameters]


def error(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return max(float((x - y).abs().max()) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("implementation", ["torch", "torch_fused", "deepspeed"])
def test_equals_the_paper(implementation):
    """fp32 weights of size 1 after 20 steps: a few roundings of 6e-8 each."""
    config = OptimizerConfig(implementation=implementation)
    if implementation == "deepspeed":
        try:
            resolve_implementation("deepspeed", "cpu", offload=True)
        except MegalmError as reason:
            pytest.skip(str(reason))
    assert error(trained(config), by_hand(config)) < 2e-6
    # Negative control: decay that goes through the moments (coupled L2) is another algorithm.
    assert error(trained(config), by_hand(config, decoupled=False)) > 1e-3


def test_auto_on_a_cpu_is_torch_fused_even_with_offload():
    assert resolve_implementation("auto", "cpu", offload=False) == "torch_fused"
    assert resolve_implementation("auto", "cpu", offload=True) == "torch_fused"


def test_auto_falls_back_to_plain_torch_and_says_why(monkeypatch, caplog):
    break_kernel(monkeypatch, "torch_fused", RuntimeError("no such kernel"))
    assert resolve_implementation("auto", "cpu", offload=False) == "torch"
    assert "no such kernel" in caplog.text


def test_auto_with_offload_prefers_deepspeed_then_torch_fused(monkeypatch, caplog):
    break_kernel(monkeypatch, "no kernel", RuntimeError())
    assert resolve_implementation("auto", "cuda", offload=True) == "deepspeed"
    break_kernel(monkeypatch, "deepspeed", RuntimeError("no compiler"))
    assert resolve_implementation("auto", "cuda", offload=True) == "torch_fused"
    assert "no compiler" in caplog.text


def test_a_named_implementation_that_fails_is_an_error(monkeypatch):
    break_kernel(monkeypatch, "deepspeed", RuntimeError("ninja is missing"))
    with pytest.raises(MegalmError, match="(?s)deepspeed, which fails.*ninja is missing.*install ninja.*C.. compiler"):
        build_optimizer([], OptimizerConfig(implementation="deepspeed"), "cpu", offload=False)


def test_the_self_check_catches_a_kernel_that_computes_something_else(monkeypatch):
    make = adamw._make

    def coupled(name, groups, config, device, offload):
        if name == "torch_fused":
            return torch.optim.Adam(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2))
        return make(name, groups, config, device, offload)

    monkeypatch.setattr(adamw, "_make", coupled)
    with pytest.raises(MegalmError, match="torch_fused, which fails.*AssertionError"):
        resolve_implementation("torch_fused", "cpu", offload=False)


def break_kernel(monkeypatch, broken: str, failure: Exception) -> None:
    def check(implementation, device, offload):
        if implementation == broken:
            raise failure

    monkeypatch.setattr(adamw, "_self_check", check)


@pytest.fixture
def apex_folder(tmp_path, monkeypatch):
    """An empty package `apex` that comes first on the path."""
    folder = tmp_path / "apex"
    folder.mkdir()
    (folder / "__init__.py").write_text("raise RuntimeError('the wrong package must not even be imported')\n")
    monkeypatch.syspath_prepend(tmp_path)
    yield folder
    for name in [name for name in sys.modules if name.split(".")[0] == "apex"]:
        del sys.modules[name]


def make_nvidia(folder, body: str) -> None:
    (folder / "__init__.py").write_text("")
    (folder / "optimizers").mkdir()
    (folder / "optimizers" / "__init__.py").write_text(body)


FUSED_ADAM = """
import torch

class FusedAdam(torch.optim.AdamW):
    def __init__(self, params, adam_w_mode, **options):
        assert adam_w_mode
        super().__init__(params, **options)
"""


def pretend_cuda_is_cpu(monkeypatch) -> None:
    """Self-checks of GPU kernels run on the CPU: only the seam is tested here."""
    check = adamw._self_check
    monkeypatch.setattr(
        adamw, "_self_check", lambda implementation, device, offload: check(implementation, "cpu", False)
    )


def test_apex_serves_on_a_gpu(apex_folder, monkeypatch):
    make_nvidia(apex_folder, FUSED_ADAM)
    pretend_cuda_is_cpu(monkeypatch)
    assert resolve_implementation("apex", "cuda", offload=False) == "apex"
    assert resolve_implementation("auto", "cuda", offload=False) == "apex"
    groups = [{"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.1}]
    optimizer = build_optimizer(groups, OptimizerConfig(implementation="apex"), "cuda", offload=False)
    assert type(optimizer).__module__ == "apex.optimizers"


@pytest.mark.parametrize(("device", "offload"), [("cpu", False), ("cuda", True)])
def test_apex_does_not_serve_on_the_host(apex_folder, device, offload):
    make_nvidia(apex_folder, FUSED_ADAM)
    with pytest.raises(MegalmError, match="updates on GPUs only"):
        resolve_implementation("apex", device, offload)


def test_the_other_apex_is_told_apart(apex_folder, monkeypatch, caplog):
    with pytest.raises(MegalmError, match="optimizer.implementation is apex, but .*not NVIDIA's.*uninstall it"):
        resolve_implementation("apex", "cuda", offload=False)
    break_kernel(monkeypatch, "deepspeed", RuntimeError("nvcc is missing"))
    assert resolve_implementation("auto", "cuda", offload=False) == "torch_fused"
    assert "not NVIDIA's" in caplog.text
    assert "nvcc is missing" in caplog.text


def test_no_apex(monkeypatch):
    if "apex" in sys.modules:
        pytest.skip("apex is installed here")
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(MegalmError, match="apex is not installed"):
        resolve_implementation("apex", "cuda", offload=False)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ImportError('undefined symbol')", "does not import.*undefined symbol"),
        (FUSED_ADAM.replace("assert adam_w_mode", "raise RuntimeError('requires cuda extensions')"), "cuda extensions"),
    ],
    ids=["does not import", "built without CUDA"],
)
def test_a_broken_apex(apex_folder, monkeypatch, body, message):
    make_nvidia(apex_folder, body)
    pretend_cuda_is_cpu(monkeypatch)
    with pytest.raises(MegalmError, match=message):
        resolve_implementation("apex", "cuda", offload=False)


@pytest.mark.parametrize("implementation", ["torch", "torch_fused", "deepspeed"])
@pytest.mark.parametrize("lost", [None, "updates", "exp_avg"])
def test_state_goes_on_in_another_optimizer(implementation: str, lost: str | None) -> None:
    """What prepare() makes and updates() tells is all that a new optimizer needs; with less it is another one."""
    config = OptimizerConfig(learning_rate=1e-2, implementation=implementation)
    if adamw._problem(implementation, "cpu", False):
        pytest.skip("it is not built here")

    def make(weights: list[torch.Tensor]) -> tuple[list[torch.nn.Parameter], torch.optim.Optimizer]:
        parameters = [torch.nn.Parameter(weight.clone()) for weight in weights]
        return parameters, build_optimizer([{"params": parameters, "weight_decay": 0.1}], config, "cpu", False)

    def step(parameters: list[torch.nn.Parameter], optimizer: torch.optim.Optimizer, number: int) -> None:
        for parameter, gradient in zip(parameters, gradients()[number], strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()

    ours, optimizer = make(start())
    assert adamw.updates(optimizer) == 0
    for number in range(4):
        step(ours, optimizer, number)
    assert adamw.updates(optimizer) == 4
    theirs, other = make([parameter.detach() for parameter in ours])
    adamw.prepare(other, theirs, adamw.updates(optimizer) if lost != "updates" else 0)
    for a, b in zip(theirs, ours, strict=True):
        for moment in adamw.MOMENTS:
            if moment != lost:
                other.state[a][moment].copy_(optimizer.state[b][moment])
    for number in range(4, 7):
        step(ours, optimizer, number)
        step(theirs, other, number)
    assert all(torch.equal(a, b) for a, b in zip(theirs, ours, strict=True)) == (lost is None)
    assert (adamw.updates(other) == adamw.updates(optimizer) == 7) == (lost != "updates")


def test_a_count_in_one_parameter_of_several_is_found() -> None:
    """As DeepSpeed's FusedAdam keeps it: the others of a group stay at 0."""
    parameters = [torch.nn.Parameter(torch.ones(2)) for _ in range(3)]
    optimizer = torch.optim.AdamW(parameters)
    for parameter, count in zip(parameters, (0, 0, 5), strict=True):
        optimizer.state[parameter]["step"] = count
    assert adamw.updates(optimizer) == 5


def test_apex_counts_by_group(apex_folder, monkeypatch):
    make_nvidia(apex_folder, FUSED_ADAM)
    monkeypatch.setattr(adamw, "_self_check", lambda implementation, device, offload: None)
    weight = torch.nn.Parameter(torch.ones(3))
    optimizer = build_optimizer([{"params": [weight]}], OptimizerConfig(implementation="apex"), "cuda", offload=False)
    assert adamw.updates(optimizer) == 0
    adamw.prepare(optimizer, [weight], 5)
    assert optimizer.param_groups[0]["step"] == 5 == adamw.updates(optimizer)
    assert optimizer.state[weight].keys() == set(adamw.MOMENTS)
