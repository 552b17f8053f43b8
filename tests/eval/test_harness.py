"""The harness's adapter gives each request what the harness's own gives Hugging Face's model of the same weights."""

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager

from megalm.errors import MegalmError
from megalm.eval.generate import Sampling, collect, generate
from megalm.eval.harness import HarnessModel
from megalm.eval.load import load_model
from megalm.eval.scoring import score
from megalm.eval.tasks import load_tasks
from megalm.layout import Layout
from megalm.models.config import ModelConfig
from megalm.models.decoder import LayerList

REPOSITORY = Path(__file__).resolve().parents[2]
TASKS = [REPOSITORY / "configs" / "eval" / f"{name}.yaml" for name in ("multiple_choice", "generation", "perplexity")]

PAIRS = [
    ("Question: what is it?\nAnswer:", " a stone"),
    ("Question: what is it?\nAnswer:", " a river"),
    ("Question: what is it?\nAnswer:", " 河"),
    ("Ends in spaces  ", "and goes on"),
    ("", "nothing before"),
    ("", " nothing before"),
    ("a" * 90 + " a context beyond 64 positions", " x"),
    ("short", " a continuation that takes about as many positions as there are"),
]
TEXTS = ["One window.", "several windows " * 12, "语言模型" * 9]
PROMPTS = ["Question: what is it?\nAnswer:", "b" * 100, "c"]
UNTIL = {"until": ["\n"], "max_gen_toks": 12, "do_sample": False}


def instances(kind: str, arguments: list[tuple]) -> list[Instance]:
    return [Instance(kind, {}, each, number) for number, each in enumerate(arguments)]


def answers(model: Any) -> dict[str, list[Any]]:
    return {
        "loglikelihood": model.loglikelihood(instances("loglikelihood", PAIRS), disable_tqdm=True),
        "rolling": model.loglikelihood_rolling(instances("loglikelihood_rolling", [(t,) for t in TEXTS]), True),
        "generated": model.generate_until(instances("generate_until", [(p, UNTIL) for p in PROMPTS]), True),
    }


def largest_difference(ours: dict[str, list[Any]], theirs: dict[str, list[Any]]) -> float:
    pairs = zip(ours["loglikelihood"], theirs["loglikelihood"], strict=True)
    return max(
        *(abs(mine[0] - other[0]) for mine, other in pairs),
        *(abs(mine - other) for mine, other in zip(ours["rolling"], theirs["rolling"], strict=True)),
    )


@pytest.fixture(scope="module")
def model(make_model: Callable[..., tuple]) -> tuple[LayerList, ModelConfig]:
    return make_model()


@pytest.fixture(scope="module")
def checkpoint(
    model: tuple, make_checkpoint: Callable[..., Path], tokenizer_path: Path, tmp_path_factory: pytest.TempPathFactory
) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("run") / "checkpoints", *model, tokenizer_path)


@pytest.fixture(scope="module")
def theirs(model: tuple, tokenizer_path: Path) -> dict[str, list[Any]]:
    import transformers  # here, since ranks import this module and it takes seconds
    from lm_eval.models.huggingface import HFLM

    from tests.eval.test_generate import llama

    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_path / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    )
    return answers(HFLM(pretrained=llama(*model), tokenizer=tokenizer, max_length=64, batch_size=2, device="cpu"))


def same_as(theirs: dict[str, list[Any]], ours: dict[str, list[Any]]) -> None:
    assert largest_difference(ours, theirs) < 1e-4
    assert [greedy for _, greedy in ours["loglikelihood"]] == [greedy for _, greedy in theirs["loglikelihood"]]
    assert ours["generated"] == theirs["generated"]


def test_equals_hugging_face(model: tuple, checkpoint: Path, theirs: dict[str, list[Any]]) -> None:
    loaded = load_model(checkpoint)
    for batch_size in (1, 3):
        same_as(theirs, answers(HarnessModel(*loaded, batch_size=batch_size)))
    # negative control: a model whose norms are a little off
    with torch.no_grad():
        loaded[0].named_weights()["norm.norm.weight"].mul_(1.001)
    assert largest_difference(answers(HarnessModel(*loaded)), theirs) > 1e-3


def test_a_context_of_spaces_is_none(checkpoint: Path, theirs: dict[str, list[Any]]) -> None:
    """The harness moves them into the continuation, and its own adapter then refuses the request."""
    expected, greedy = theirs["loglikelihood"][PAIRS.index(("", " nothing before"))]
    adapter = HarnessModel(*load_model(checkpoint))
    for beside in ([], [("a longer row, behind which others are padded", " x")]):
        found = adapter.loglikelihood(instances("loglikelihood", [(" ", "nothing before"), *beside]), disable_tqdm=True)
        assert found[0] == (pytest.approx(expected, abs=1e-4), greedy)
    with pytest.raises(AssertionError, match="behind another"):
        score(load_model(checkpoint)[0], [([], [1, 2])])


def on_ranks(checkpoint: Path, layout: Layout) -> list[dict[str, list[Any]]]:
    """This rank's answers, and those where the norm of one rank is a little off."""
    from megalm.parallel.inference import join

    place = join("cpu", tensor=layout.tensor, pipeline=layout.pipeline)
    loaded = load_model(checkpoint, layers=place.layers, pipe=place.pipe, ranks=place.groups)
    adapter = HarnessModel(*loaded, batch_size=2, ranks=place.groups)
    found = [answers(adapter)]
    if place.groups.rank == 3:
        with torch.no_grad():
            loaded[0].named_weights()["norm.norm.weight"].mul_(1.01)
    found.append(answers(adapter))
    place.leave()
    return found


@pytest.mark.parametrize(
    "layout",
    [Layout(data=4), Layout(tensor=2, data=2), Layout(pipeline=2, data=2)],
    ids=Layout.describe,
)
def test_ranks_give_the_same(
    layout: Layout, checkpoint: Path, theirs: dict[str, list[Any]], on_four_ranks: Callable[..., list[Any]]
) -> None:
    for found, wrong in on_four_ranks(on_ranks, checkpoint, layout):
        same_as(theirs, found)
        assert largest_difference(wrong, theirs) > 1e-3  # negative control, seen wherever it was planted


def test_options_of_generation(checkpoint: Path) -> None:
    model, config, tokenizer = load_model(checkpoint)
    adapter = HarnessModel(model, config, tokenizer, seed=5)
    sampled = {"until": ["zzz"], "max_gen_toks": 9, "do_sample": True, "temperature": 0.7, "top_k": 9, "min_p": 0.1}
    (found,) = adapter.generate_until(instances("generate_until", [("ab", sampled)]), True)
    prompt = tokenizer.encode("ab")
    expected = generate(
        model, config, tokenizer, [prompt], max_new_tokens=9, sampling=Sampling(0.7, 9, min_p=0.1), seed=5
    )
    assert found == collect(expected, 1)[0]
    with pytest.raises(MegalmError, match="the task generates with num_beams, which megalm's sampling does not have"):
        adapter.generate_until(instances("generate_until", [("ab", UNTIL | {"num_beams": 2})]), True)
    with pytest.raises(MegalmError, match="generates 64 tokens and the model has 64 positions"):
        adapter.generate_until(instances("generate_until", [("ab", UNTIL | {"max_gen_toks": 64})]), True)
    with pytest.raises(MegalmError, match="continuation of 65 tokens"):
        adapter.loglikelihood(instances("loglikelihood", [("a", "b" * 65)]), disable_tqdm=True)


def test_equal_questions_have_answers_of_their_own_if_sampled(checkpoint: Path) -> None:
    """As `repeats` asks them, for a majority or pass@k; in whatever batches."""
    loaded = load_model(checkpoint)
    sampled = {"until": ["zzz"], "max_gen_toks": 9, "do_sample": True, "temperature": 1.0}
    asked = [("ab", sampled)] * 3 + [("c", sampled), ("ab", sampled)]
    found = [
        HarnessModel(*loaded, batch_size=size, seed=seed).generate_until(instances("generate_until", asked), True)
        for size, seed in ((1, 0), (2, 0), (8, 0), (8, 100))
    ]
    assert found[0] == found[1] == found[2]
    assert len({*found[0], *found[3]}) == 10
    greedy = [("ab", UNTIL)] * 3
    assert len({*HarnessModel(*loaded).generate_until(instances("generate_until", greedy), True)}) == 1


def evaluate(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    from tools.evaluate_model import main

    monkeypatch.setattr(sys, "argv", ["evaluate_model.py", *map(str, arguments)])
    monkeypatch.chdir(REPOSITORY)
    main()


def test_where_results_go_is_tried_before_the_model_is_loaded(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Loading(Exception):
        pass

    def load(*_: object, **__: object) -> None:
        raise Loading

    monkeypatch.setattr("megalm.eval.load.load_model", load)
    kept, new = tmp_path / "kept.json", tmp_path / "results" / "new.json"
    kept.write_text("{}")
    for output in (tmp_path, kept / "x.json"):
        with pytest.raises(
            MegalmError, match=rf"cannot write {output} \(.*: make room for it, or name another --output"
        ):
            evaluate(monkeypatch, "--checkpoint", checkpoint, "--tasks", *TASKS, "--output", output)
    for output in (kept, new):
        with pytest.raises(Loading):
            evaluate(monkeypatch, "--checkpoint", checkpoint, "--tasks", *TASKS, "--output", output)
    assert kept.read_text() == "{}" and not new.exists()


def test_the_seed_reaches_the_model_and_scores_of_other_tasks_stay(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds = []

    def run_tasks(model: HarnessModel, names: list[str], **options: Any) -> dict[str, Any]:
        seeds.append(model._seed)
        assert options["seed"] == model._seed
        each = dict.fromkeys(names, {})
        scores = {name: {"acc,none": float(model._seed)} for name in names}
        return {"samples": {}, "results": scores, "versions": each, "n-shot": each, "n-samples": each,
                "higher_is_better": each}  # fmt: skip

    monkeypatch.setattr("megalm.eval.harness.run_tasks", run_tasks)
    copied = tmp_path / "model"
    shutil.copytree(checkpoint, copied)
    for folder, output in (
        (checkpoint, checkpoint.parent.parent / "evaluation" / "step-20.json"),
        (copied, copied / "evaluation.json"),
    ):
        for seed, names in enumerate((["a"], ["b", "c"], ["c"])):
            evaluate(monkeypatch, "--checkpoint", folder, "--tasks", *names, "--seed", seed)
        found = json.loads(output.read_text())
        assert {task: score["acc,none"] for task, score in found["results"].items()} == {"a": 0, "b": 1, "c": 2}
        assert [found["options"][task]["seed"] for task in "abc"] == [0, 1, 2]
        found["checkpoint"]["fingerprint"] = "other weights"
        output.write_text(json.dumps(found))
        evaluate(monkeypatch, "--checkpoint", folder, "--tasks", "b")
        assert json.loads(output.read_text())["results"].keys() == {"b"}
        output.unlink()
    assert seeds == [0, 1, 2, 0] * 2


def test_a_task_file_whose_functions_are_not_there_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    for function, helper in (("helper.missing", ""), ("helper.f", "import nowhere_installed\n")):
        (tmp_path / "helper.py").write_text(helper)
        file.write_text(f"task: x\noutput_type: generate_until\nprocess_results: !function {function}\n")
        with pytest.raises(MegalmError, match=rf"^{file} cannot be loaded \(.+\): correct or leave out tasks$"):
            load_tasks([str(file)], [])


@pytest.mark.parametrize("content", [b"task: x\nbad: [\n", b"task: \xff\n", b"\xff\xfetask: x\n"])
def test_a_task_file_that_is_no_yaml_is_one_sentence(content: bytes, tmp_path: Path) -> None:
    file = tmp_path / "task.yaml"
    file.write_bytes(content)
    with pytest.raises(MegalmError, match=rf"^{file} cannot be loaded \(.+\): correct or leave out tasks$"):
        load_tasks([str(file)], [])


def test_the_command_over_a_checkpoint_and_over_an_export(
    model: tuple,
    checkpoint: Path,
    tokenizer_path: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Local task files, and a task of the harness's own over a local copy of its data, with nothing from the net."""
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    evaluate(monkeypatch, "--checkpoint", checkpoint, "--tasks", *TASKS, "--samples", "--batch-size", 4)
    out = capsys.readouterr().out
    lines = [line.split() for line in out.splitlines()]
    assert lines[0] == ["task", "shots", "metric", "value", "standard", "error", "questions"]
    assert [line[:4] for line in lines if "acc" in line] == [["local_multiple_choice", "0", "acc", "↑"]]
    output = checkpoint.parent.parent / "evaluation" / "step-20.json"
    ours = json.loads(output.read_text())
    assert ours["checkpoint"]["step"] == 20 and len(ours["checkpoint"]["fingerprint"]) == 32
    assert ours["harness"]["version"] and set(ours["task_hashes"]) == set(ours["results"])
    assert ours["results"]["local_multiple_choice"]["acc_stderr,none"] > 0
    assert len((output.parent / "step-20.local_generation.jsonl").read_text().splitlines()) == 3

    import transformers

    from tests.eval.test_generate import llama

    exported = llama(*model)
    exported.save_pretrained(tmp_path / "export")
    transformers.PreTrainedTokenizerFast(
        tokenizer_file=str(tokenizer_path / "tokenizer.json"), eos_token="<|endoftext|>", pad_token="<|endoftext|>"
    ).save_pretrained(tmp_path / "export")
    evaluate(monkeypatch, "--hf", tmp_path / "export", "--tasks", *TASKS, "--dtype", "float32", "--device", "cpu")
    theirs = json.loads((tmp_path / "export" / "evaluation.json").read_text())
    assert theirs["task_hashes"] == ours["task_hashes"]
    for task, metrics in ours["results"].items():
        for name, value in metrics.items():
            if isinstance(value, float) and "stderr" not in name:
                assert theirs["results"][task][name] == pytest.approx(value, rel=1e-4), (task, name)

    hellaswag = tmp_path / "data" / "Rowan" / "hellaswag"
    hellaswag.mkdir(parents=True)
    rows = [
        {
            "activity_label": "Cooking",
            "ctx_a": "A man stirs a pot.",
            "ctx_b": "he",
            "endings": ["eats.", "flies away.", "sings to it.", "sits down."],
            "label": str(number % 4),
        }
        for number in range(4)
    ]
    for split in ("train", "validation"):
        (hellaswag / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = tmp_path / "hellaswag.json"
    options = ("--data", tmp_path / "data", "--limit", 3, "--output", result)
    kept: dict[bool, TaskManager] = {}  # the harness reads 13,000 files to know its tasks: once will do

    def known(include_path: list[str], include_defaults: bool) -> TaskManager:
        assert not include_path
        if include_defaults not in kept:
            kept[include_defaults] = TaskManager(include_path=include_path, include_defaults=include_defaults)
        return kept[include_defaults]

    monkeypatch.setattr("megalm.eval.tasks.TaskManager", known)
    evaluate(monkeypatch, "--checkpoint", checkpoint, "--tasks", "hellaswag", *options)
    assert json.loads(result.read_text())["documents"]["hellaswag"]["effective"] == 3
    with pytest.raises(MegalmError, match=r"there is no task hellaswagg \(did you mean hellaswag\?\)"):
        evaluate(monkeypatch, "--checkpoint", checkpoint, "--tasks", "hellaswagg", *options)
    lost = tmp_path / "lost.yaml"
    lost.write_text(TASKS[0].read_text().replace("configs/eval/data/", "nowhere/"))
    with pytest.raises(MegalmError, match=r"the data of local_multiple_choice cannot be read \(.*Unable to find"):
        evaluate(monkeypatch, "--checkpoint", checkpoint, "--tasks", lost, *options)
