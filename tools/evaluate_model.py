"""Measure a model on tasks of the lm-evaluation-harness: its own, or task files over local data.

On several ranks, which share the model's weights (--tensor, --pipeline) and the questions, under a launcher:
torchrun --nproc-per-node 4 tools/evaluate_model.py --checkpoint RUN --tensor 2 --tasks ...
"""

import argparse
import json
import os
import sys
import time
from contextlib import nullcontext, redirect_stdout
from pathlib import Path
from typing import Any

from megalm.command_line import count, count_or_zero
from megalm.disk import try_writing
from megalm.errors import MegalmError, main_guard, writing

BY_TASK = ("options", "results", "groups", "task_hashes", "task_versions", "shots", "documents", "higher_is_better")
"""What results say of each task."""


def main() -> None:
    given = arguments()
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if given.hf and (given.tensor, given.pipeline) != (1, 1):
        raise MegalmError(
            "--tensor and --pipeline cut a --checkpoint, and every rank holds all of an --hf model: leave them out",
            echo=os.environ.get("RANK", "0") != "0",
        )
    if given.fewshot_as_multiturn and not given.apply_chat_template:
        raise MegalmError("--fewshot-as-multiturn makes turns of a chat of the examples: add --apply-chat-template")
    if given.data:
        if not given.data.is_dir():
            raise MegalmError(f"--data {given.data} is not a folder: name the one that holds the datasets")
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    started = time.time()
    silent = redirect_stdout(sys.stderr)  # libraries talk; the table alone goes to standard output
    with silent:
        place, model, about = load_hugging_face(given, ranks) if given.hf else load_checkpoint(given, ranks)
        try:
            from megalm.eval.harness import report, run_tasks
        except ImportError as error:
            raise lacking(error) from None
        found = run_tasks(
            model,
            given.tasks,
            include=given.include,
            data=given.data,
            shots=given.shots,
            limit=given.limit,
            bootstrap=given.bootstrap,
            seed=given.seed,
            chat=given.apply_chat_template,
            system=given.system,
            multiturn=given.apply_chat_template and given.fewshot_as_multiturn is not False,
        )
    if found is not None and (place is None or place.groups.rank == 0):
        names = ("shots", "limit", "seed", "batch_size", "tensor", "pipeline", "apply_chat_template", "system")
        options = {name: getattr(given, name) for name in (*names, "fewshot_as_multiturn")}
        seconds = round(time.time() - started, 1)
        kept, table = report(found, about | {"options": dict.fromkeys(found["results"], options), "seconds": seconds})
        print(table)
        write(given, kept, found["samples"])
    if place:
        with silent if place.groups.rank else nullcontext():
            place.leave()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    which = parser.add_mutually_exclusive_group(required=True)
    which.add_argument("--checkpoint", type=Path, metavar="RUN", help="run folder (its newest checkpoint), or step-N")
    which.add_argument("--hf", type=Path, metavar="DIR", help="folder of a Hugging Face model, such as an export")
    add("--tasks", nargs="+", required=True, metavar="TASK", help="names that the harness knows, or task files (.yaml)")
    add("--include", nargs="+", type=Path, default=[], metavar="DIR", help="folders of more task files, known by name")
    add(
        "--data",
        type=Path,
        metavar="DIR",
        help="read datasets from here, offline: DIR/NAME-ON-THE-HUB, and paths in task files (default: as they are)",
    )
    add("--shots", type=count_or_zero, metavar="N", help="examples before each question (default: as the task says)")
    add("--apply-chat-template", action="store_true", help="ask in a chat, by the template beside the tokenizer")
    add("--system", metavar="TEXT", help="what stands before each question, in a chat as its system message")
    add(
        "--fewshot-as-multiturn",
        action=argparse.BooleanOptionalAction,
        help="examples are turns of the chat, not text before the question (default: yes in a chat)",
    )
    add("--limit", type=count, metavar="N", help="only the first N documents of each task, for a trial")
    add("--batch-size", type=count, default=16, metavar="N", help="rows in one pass (default: %(default)s)")
    add(
        "--bootstrap",
        type=count_or_zero,
        default=1000,
        metavar="N",
        help="draws for standard errors (default: %(default)s)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of few-shot examples and sampling (default: 0)")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help="default: RUN/evaluation/step-N.json, or evaluation.json in DIR; what it holds of other tasks stays",
    )
    add("--samples", action="store_true", help="also write every question and answer, a .jsonl per task beside it")
    add("--dtype", choices=["float32", "bfloat16", "float16"], help="of the weights (default: as they were trained)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one")
    add("--tensor", type=int, default=1, metavar="N", help="ranks that share each layer's weights (default: 1)")
    add("--pipeline", type=int, default=1, metavar="N", help="stages that share the layers, in memory (default: 1)")
    add("--tokenizer", metavar="PATH", help="where it is, if it moved since the run")
    return parser.parse_args()


def lacking(error: ImportError) -> MegalmError:
    return MegalmError(f"evaluation needs the lm-evaluation-harness ({error}): pip install 'megalm[eval]'")


def load_checkpoint(given: argparse.Namespace, ranks: int) -> tuple[Any, Any, dict[str, Any]]:
    """This rank's place (None for one process), the model for the harness, and what there is to say of it."""
    import torch  # from here on imports take seconds

    from megalm.checkpoint import folder as checkpoints
    from megalm.checkpoint import manifest as manifests
    from megalm.eval.load import load_model

    folder = checkpoints.resolve(given.checkpoint)
    of_run = folder.resolve().parent.name == "checkpoints"
    settle_output(
        given, folder.parent.parent / f"evaluation/{folder.name}.json" if of_run else folder / "evaluation.json"
    )
    device: Any = given.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place, where = None, dict[str, Any]()
    if ranks > 1 or (given.tensor, given.pipeline) != (1, 1):
        from megalm.parallel.inference import join

        place = join(device, tensor=given.tensor, pipeline=given.pipeline)
        device, where = place.device, {"layers": place.layers, "pipe": place.pipe, "ranks": place.groups}
    dtype = getattr(torch, given.dtype) if given.dtype else None
    model, config, tokenizer = load_model(
        given.checkpoint, device=device, dtype=dtype, tokenizer=given.tokenizer, **where
    )
    try:
        from megalm.eval.harness import HarnessModel
    except ImportError as error:
        raise lacking(error) from None
    manifest = manifests.read(folder)
    about = {
        "checkpoint": {
            "path": str(folder),
            "fingerprint": manifests.checksum(folder / manifests.NAME),  # which holds the checksum of every file
            "step": manifest.step,
            "tokens": manifest.tokens,
        },
        "tokenizer": tokenizer.fingerprint,
        "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
        "layout": {
            "pipeline": given.pipeline,
            "data": place.groups.data_size if place else 1,
            "tensor": given.tensor,
        },
    }
    chat = None
    if given.apply_chat_template:
        from megalm.eval.load import chat_template
        from megalm.tokenizer.chat import Chat

        chat = Chat(tokenizer, chat_template(given.checkpoint, given.tokenizer))
    groups = place.groups if place else None
    options: Any = {"batch_size": given.batch_size, "seed": given.seed, "ranks": groups, "chat": chat}
    return place, HarnessModel(model, config, tokenizer, **options), about


def load_hugging_face(given: argparse.Namespace, ranks: int) -> tuple[Any, Any, dict[str, Any]]:
    """The same of a folder that transformers reads, through the harness's own adapter, a copy on every rank."""
    if not (given.hf / "config.json").is_file():
        raise MegalmError(f"{given.hf} is not the folder of a Hugging Face model: it has no config.json")
    settle_output(given, given.hf / "evaluation.json")
    try:
        from lm_eval.models.huggingface import HFLM
        from lm_eval.utils import hash_string

        from megalm.eval.harness import Copies
    except ImportError as error:
        raise lacking(error) from None
    import torch

    from megalm.checkpoint.manifest import checksum

    device = given.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place = None
    if ranks > 1:
        from megalm.parallel.inference import join

        place = join(device)  # HFLM finds these ranks, and takes the rank's own device
    model: Any = HFLM(
        pretrained=str(given.hf.resolve()),
        tokenizer=given.tokenizer,
        dtype=given.dtype or "auto",
        device=device,
        batch_size=given.batch_size,
    )
    weights = sorted(path for path in given.hf.iterdir() if path.suffix in (".safetensors", ".bin"))
    files = {path.name: checksum(path) for path in [given.hf / "config.json", *weights]}
    about = {
        "checkpoint": {"path": str(given.hf), "fingerprint": hash_string(json.dumps(files)), "files": files},
        "dtype": str(model.model.dtype).removeprefix("torch."),
        "layout": {"data": ranks, "tensor": 1},
    }
    if given.apply_chat_template and model.tokenizer.chat_template is None:
        raise MegalmError(f"{given.hf} has no chat template: put chat_template.jinja there, or ask without a chat")
    return place, Copies(model, place.groups) if place else model, about


def settle_output(given: argparse.Namespace, otherwise: Path) -> None:
    """Decide where the results go, and try it before the hours that make them, on the rank that will write them."""
    given.output = given.output or otherwise
    if os.environ.get("RANK", "0") == "0":
        with writing(given.output):
            try_writing(given.output)


def with_other_tasks(kept: dict[str, Any], output: Path) -> dict[str, Any]:
    """The results, and what `output` holds already of the same weights: its other tasks."""
    try:
        before = json.loads(output.read_text(encoding="utf-8"))
        if before["checkpoint"]["fingerprint"] != kept["checkpoint"]["fingerprint"]:
            return kept
        return kept | {key: before[key] | kept[key] for key in BY_TASK}
    except (OSError, ValueError, KeyError, TypeError):  # there is nothing, or nothing of ours
        return kept


def write(given: argparse.Namespace, kept: dict[str, Any], samples: dict[str, list[Any]]) -> None:
    """The results, and the samples if they are wanted."""
    output = given.output
    with writing(output):
        output.parent.mkdir(parents=True, exist_ok=True)
        whole = with_other_tasks(kept, output)
        output.write_text(json.dumps(whole, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        for task, each in samples.items() if given.samples else ():
            lines = "".join(json.dumps(sample, ensure_ascii=False, default=str) + "\n" for sample in each)
            output.with_name(f"{output.stem}.{task}.jsonl").write_text(lines, encoding="utf-8")
    print(output)


if __name__ == "__main__":
    main_guard(main)
