"""The commands, as they are typed: what they print, and their exit codes."""

import io
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from megalm.checkpoint import manifest as manifests
from megalm.errors import MegalmError
from megalm.tokenizer.load import load

REPOSITORY = Path(__file__).resolve().parents[2]


def command(name: str, *arguments: object, given: bytes = b"", cwd: Path = REPOSITORY) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `python tools/NAME.py ARGUMENTS`, in UTF-8."""
    done = subprocess.run(
        [sys.executable, str(REPOSITORY / "tools" / f"{name}.py"), *map(str, arguments)],
        input=given,
        capture_output=True,
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY), "PYTHONIOENCODING": "utf-8"},
    )
    return done.returncode, done.stdout.decode(), done.stderr.decode()


def here(
    main: Callable[[], object],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    *arguments: object,
    given: str = "",
) -> str:
    """What a command's main() prints, in this process: starting one takes seconds."""
    monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(given.encode())))
    main()
    return capsys.readouterr().out


@pytest.fixture(scope="module")
def run(
    tmp_path_factory: pytest.TempPathFactory,
    make_model: Callable[..., tuple],
    make_checkpoint: Callable[..., Path],
    tokenizer_path: Path,
) -> Path:
    """A run with two checkpoints."""
    folder = tmp_path_factory.mktemp("run")
    for step in (10, 20):
        fingerprint = load(tokenizer_path).fingerprint
        make_checkpoint(
            folder / "checkpoints", *make_model(), tokenizer_path, step=step, tensor=2, fingerprint=fingerprint
        )
    return folder


def test_generate_prints_the_prompt_and_goes_on(
    run: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools.generate import main

    prompt = "naïve 语言\n"
    code, out, err = command("generate", run, "--prompt", prompt, "--max-new-tokens", 30, "--top-k", 40, "--seed", 3)
    assert (code, err) == (0, "")
    assert out.startswith(prompt) and len(out) > len(prompt) + 5
    # from standard input, whose last line ends there; the same seed
    options = ["--max-new-tokens", 30, "--top-k", 40, "--seed", 3]
    assert here(main, capsys, monkeypatch, run, *options, given=f"{prompt}\n") == out


def test_generate_says_what_it_leaves_out_and_what_is_wrong(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools.generate import main

    monkeypatch.setattr(sys, "argv", ["generate", str(run), "--prompt", "x" * 100, "--max-new-tokens", "1", "--greedy"])
    main()
    out, err = capsys.readouterr()
    assert out.startswith("x" * 100)
    assert err == "note: the model sees the last 64 of the prompt's 100 tokens\n"
    with pytest.raises(MegalmError, match=r"nowhere does not exist: name a run folder or RUN/checkpoints/step-N$"):
        here(main, capsys, monkeypatch, tmp_path / "nowhere", "--prompt", "x")
    code, out, err = command("generate", run, given=b"\xff")
    assert (code, out, err) == (2, "", "error: the prompt on standard input is not UTF-8 text (at byte 0)\n")


def test_generate_many_and_stop(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from tools.generate import main

    plain, lines = tmp_path / "prompts.txt", tmp_path / "prompts.jsonl"
    prompts = ["one", "naïve 语言", "3"]
    plain.write_text("\n".join(prompts) + "\n")
    lines.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    options = ["--max-new-tokens", 12, "--greedy", "--batch-size", 2]
    out = here(main, capsys, monkeypatch, run, "--prompts", plain, *options)
    found = [json.loads(line) for line in out.splitlines()]
    assert [each["prompt"] for each in found] == prompts and all(len(each["text"]) > 3 for each in found)
    stop = found[0]["text"][4:6]
    out = here(main, capsys, monkeypatch, run, "--prompts", lines, *options, "--stop", stop)
    assert [json.loads(line)["text"] for line in out.splitlines()] == [each["text"].split(stop)[0] for each in found]
    lines.write_text('{"prompt": 3}\n')
    with pytest.raises(MegalmError, match=r"prompts.jsonl line 1 is not an object with a text named prompt"):
        here(main, capsys, monkeypatch, run, "--prompts", lines)
    plain.write_text("\n")
    with pytest.raises(MegalmError, match=r"prompts.txt holds no prompt: write one a line$"):
        here(main, capsys, monkeypatch, run, "--prompts", plain)
    with pytest.raises(MegalmError, match=r"start it with torchrun --nproc-per-node 2"):
        here(main, capsys, monkeypatch, run, "--prompt", "x", "--tensor", 2)
    with pytest.raises(MegalmError, match=r"--tensor 2 x --pipeline 3 .* 6 ranks and 1 was started: .* 6$"):
        here(main, capsys, monkeypatch, run, "--prompt", "x", "--tensor", 2, "--pipeline", 3)
    with pytest.raises(MegalmError, match=r"--tensor 1 and --pipeline 0 are 1 or more"):
        here(main, capsys, monkeypatch, run, "--prompt", "x", "--pipeline", 0)
    with pytest.raises(MegalmError, match=r"neither a chat template nor ChatML's control tokens"):
        here(main, capsys, monkeypatch, run, "--chat", "--prompt", "x")


def test_chat(
    tmp_path: Path,
    make_model: Callable[..., tuple],
    make_checkpoint: Callable[..., Path],
    make_tokenizer: Callable,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tools.generate import main

    path = make_tokenizer(tmp_path / "tokenizer", ("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    make_checkpoint(tmp_path / "run", *make_model(vocab_size=259, max_position_embeddings=512), path)
    options = ["--chat", "--greedy", "--max-new-tokens", 8, "--system", "be brief"]
    both = here(main, capsys, monkeypatch, tmp_path / "run", *options, given="hello\nagain\n")
    first = here(main, capsys, monkeypatch, tmp_path / "run", *options, "--prompt", "hello")
    assert both.startswith(first) and len(both) > len(first) > 1
    alone = here(main, capsys, monkeypatch, tmp_path / "run", *options, "--prompt", "again")
    assert both != first + alone, "the second answer knows the first"


def test_show_checkpoint(run: Path, make_model: Callable[..., tuple]) -> None:
    code, out, err = command("show_checkpoint", run, "--verify", "--statistics")
    assert (code, err) == (0, "")
    lines = [" ".join(line.split()) for line in out.splitlines()]
    assert [line.split()[0] for line in lines[2:4]] == ["10", "20"] and lines[3].endswith("tensor 2 (newest)")
    assert f"{run}/checkpoints/step-20" in lines
    assert "step 20" in lines and "tokens 20,480 trained" in lines
    assert "layout pipeline 1 x data 1 x tensor 2" in lines and "versions megalm 0.1.0" in lines
    assert "samples: 320" in lines
    assert "verified all 4 files are as they were written" in lines
    (embedding,) = (line.split() for line in lines if line.endswith("embedding.table.weight"))
    assert embedding[:5] == ["384", "x", "48", "float32", "0"]
    table = make_model()[0].named_weights()["embedding.table.weight"].detach()
    expected = [table.mean(), table.std(correction=0), table.abs().max()]
    assert [float(number) for number in embedding[5:8]] == pytest.approx([x.item() for x in expected], rel=5e-3)


def test_a_damaged_manifest_is_a_fault(
    tmp_path: Path, make_model: Callable[..., tuple], make_checkpoint: Callable[..., Path], tokenizer_path: Path
) -> None:
    """Although another checkpoint is the newest."""
    old, _ = (make_checkpoint(tmp_path / "checkpoints", *make_model(), tokenizer_path, step=step) for step in (10, 20))
    manifest = old / manifests.NAME
    manifest.write_text(manifest.read_text().replace('"step": 10', '"step": 11', 1))
    code, out, err = command("show_checkpoint", tmp_path, "--verify")
    assert code == 2 and "DAMAGED" in out and "manifest.json was altered" in err, err


def test_show_checkpoint_names_what_is_damaged(
    tmp_path: Path,
    make_model: Callable[..., tuple],
    make_checkpoint: Callable[..., Path],
    tokenizer_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from tools.show_checkpoint import main

    for step in (10, 20):
        folder = make_checkpoint(tmp_path / "checkpoints", *make_model(), tokenizer_path, step=step)
    weights, other = "weights-rank-00000.safetensors", "moments-rank-00000.safetensors"
    (folder / weights).unlink()
    content = (folder / other).read_bytes()
    (folder / other).write_bytes(content[:-1] + b"!")
    # sizes are always compared, contents with --verify
    with pytest.raises(MegalmError) as damaged:
        here(main, capsys, monkeypatch, folder)
    out = capsys.readouterr().out
    assert f"DAMAGED      {weights} is missing" in out and other not in out
    assert str(damaged.value) == (
        f"checkpoint {folder} is damaged: {weights} is missing; use {tmp_path}/checkpoints/step-10 instead"
    )
    code, out, err = command("show_checkpoint", tmp_path, "--verify", "--tensors")
    assert code == 2 and f"DAMAGED {weights} is missing" in out and f"DAMAGED {other} was altered" in out
    assert "(and 1 more fault)" in err
    (folder / manifests.NAME).write_text("{")
    with pytest.raises(MegalmError, match=r"manifest.json cannot be read"):
        here(main, capsys, monkeypatch, tmp_path)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGPIPE")
def test_a_reader_that_leaves_is_no_error(run: Path) -> None:
    shell = f"{sys.executable} {REPOSITORY}/tools/show_checkpoint.py {run} --tensors | head -n 1"
    done = subprocess.run(
        shell, shell=True, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)}
    )
    assert done.stdout == f"{run}/checkpoints\n" and done.stderr == ""
