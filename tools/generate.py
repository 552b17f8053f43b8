"""Continue a text, or many, or talk, with a trained model.

On several ranks, which share the model's weights (--tensor, --pipeline), under a launcher:
torchrun --nproc-per-node 4 tools/generate.py RUN --tensor 2 --pipeline 2 ...
"""

import argparse
import json
import os
import signal
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megalm.command_line import count, count_or_zero
from megalm.errors import MegalmError, main_guard

if TYPE_CHECKING:
    from megalm.tokenizer.chat import Chat, Message

Generate = Callable[..., Any]
"""eval.generate.generate with its model and options, from prompts of ids on."""


def main() -> None:
    given = arguments()
    if given.chat and given.prompts:
        raise MegalmError("--chat holds one conversation: leave out --prompts, or --chat")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if min(given.tensor, given.pipeline) < 1:
        raise MegalmError(f"--tensor {given.tensor} and --pipeline {given.pipeline} are 1 or more: 1 cuts nothing")
    shared = given.tensor * given.pipeline
    if shared != ranks:
        raise MegalmError(
            f"--tensor {given.tensor} x --pipeline {given.pipeline} shares the weights between {shared} ranks and "
            f"{ranks} {'was' if ranks == 1 else 'were'} started: start it with torchrun --nproc-per-node {shared}",
            echo=os.environ.get("RANK", "0") != "0",
        )
    if ranks > 1 and not (given.prompt or given.prompts or given.chat):
        raise MegalmError(
            "several ranks cannot read one standard input: give --prompt or --prompts",
            echo=os.environ["RANK"] != "0",
        )
    prompts = [] if given.chat else read_prompts(given)

    import torch  # from here on imports take seconds

    from megalm.eval.generate import Sampling, collect, encode_prompt, generate
    from megalm.eval.load import load_model

    temperature = 0.0 if given.greedy else given.temperature
    sampling = Sampling(temperature, given.top_k, given.top_p, given.min_p, given.repetition_penalty)
    device: Any = given.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    place, where = None, dict[str, Any]()
    if ranks > 1:
        from megalm.parallel.inference import join

        place = join(device, tensor=given.tensor, pipeline=given.pipeline)
        device, where = place.device, {"layers": place.layers, "pipe": place.pipe, "ranks": place.groups}
    model, config, tokenizer = load_model(given.path, device=device, tokenizer=given.tokenizer, **where)
    say: Any = print if place is None or place.groups.rank == 0 else lambda *_, **__: None
    run = partial(
        generate,
        model,
        config,
        tokenizer,
        max_new_tokens=given.max_new_tokens,
        sampling=sampling,
        stop=given.stop,
        seed=given.seed,
    )
    if given.chat:
        from megalm.eval.load import chat_template
        from megalm.tokenizer.chat import Chat

        chat = Chat(tokenizer, chat_template(given.path, given.tokenizer))
        talk(chat, run, given.system, given.prompt, (lambda: place.groups.decide(ask)) if place else ask, say)
    else:
        encoded = [encode_prompt(tokenizer, prompt) for prompt in prompts]
        length, context = max(map(len, encoded), default=0), config.max_position_embeddings
        if length > context:
            say(f"note: the model sees the last {context} of the prompt's {length} tokens", file=sys.stderr)
        if given.prompts:
            for start in range(0, len(prompts), given.batch_size):
                batch = encoded[start : start + given.batch_size]
                for prompt, text in zip(prompts[start:], collect(run(batch, seed=given.seed + start), len(batch))):
                    say(json.dumps({"prompt": prompt, "text": text}, ensure_ascii=False), flush=True)
        else:
            say(prompts[0], end="", flush=True)
            show(run(encoded), say)
    if place:
        place.leave()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("path", metavar="RUN", help="run folder (its newest checkpoint) or RUN/checkpoints/step-N")
    add("--prompt", metavar="TEXT", help="default: standard input")
    add(
        "--prompts",
        type=Path,
        metavar="FILE",
        help='many: one a line, or .jsonl of {"prompt": TEXT}; prints {"prompt": TEXT, "text": TEXT} for each',
    )
    add(
        "--batch-size", type=count, default=16, metavar="N", help="of --prompts, so many at once (default: %(default)s)"
    )
    add("--chat", action="store_true", help="answer --prompt, or each line of standard input")
    add("--system", metavar="TEXT", help="with --chat: the system message")
    add(
        "--max-new-tokens",
        type=count_or_zero,
        default=200,
        metavar="N",
        help="stop after so many (default: %(default)s)",
    )
    add("--stop", action="append", default=[], metavar="TEXT", help="stop before this text; may be repeated")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy, 1 the model's own (default: 0.8)")
    add("--top-k", type=int, metavar="K", help="draw from the K most likely tokens (default: all)")
    add("--top-p", type=float, metavar="P", help="of these, from the fewest whose probabilities reach P (default: all)")
    add("--min-p", type=float, metavar="P", help="of these, from those with P times the likeliest's probability")
    add("--repetition-penalty", type=float, default=1.0, metavar="X", help="above 1: what is there is likely less")
    add("--greedy", action="store_true", help="always take the most likely token")
    add("--seed", type=int, default=0, metavar="N", help="the same seed, the same text (default: 0)")
    add("--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one")
    add("--tensor", type=int, default=1, metavar="N", help="ranks that share each layer's weights (default: 1)")
    add("--pipeline", type=int, default=1, metavar="N", help="stages that share the layers, in memory (default: 1)")
    add("--tokenizer", metavar="PATH", help="where it is, if it moved since the run")
    return parser.parse_args()


def read_prompts(given: argparse.Namespace) -> list[str]:
    """--prompt, the lines of --prompts, or all of standard input without the end of its last line."""
    if given.prompt is not None:
        return [given.prompt]
    if given.prompts is None and sys.stdin.isatty():
        print("type the prompt, then Ctrl-D on a line of its own", file=sys.stderr)
    where = given.prompts or "standard input"
    try:
        text = (given.prompts.read_bytes() if given.prompts else sys.stdin.buffer.read()).decode()
    except OSError as error:
        raise MegalmError(f"cannot read the prompts {where} ({error.strerror}): correct the path") from None
    except UnicodeDecodeError as error:
        raise MegalmError(f"the prompt on {where} is not UTF-8 text (at byte {error.start})") from None
    if given.prompts is None:
        return [text.removesuffix("\n")]
    if not text.strip():
        raise MegalmError(f"{given.prompts} holds no prompt: write one a line")
    lines = text.removesuffix("\n").split("\n")
    if given.prompts.suffix != ".jsonl":
        return lines
    return [_prompt(line, f"{given.prompts} line {number}") for number, line in enumerate(lines, start=1)]


def _prompt(line: str, where: str) -> str:
    try:
        prompt = json.loads(line)["prompt"]
    except (ValueError, KeyError, TypeError):
        prompt = None
    if not isinstance(prompt, str):
        raise MegalmError(f'{where} is not an object with a text named prompt: write {{"prompt": "..."}}')
    return prompt


def ask() -> str | None:
    """The next line of standard input; None at its end."""
    try:
        return input("> " if sys.stdin.isatty() else "")
    except EOFError:
        return None


def talk(
    chat: "Chat",
    run: Generate,
    system: str | None,
    asked: str | None,
    next_line: Callable[[], str | None],
    say: Callable[..., None],
) -> None:
    """Answer `asked`, or what next_line() returns until it is None. The model sees the whole conversation."""
    messages: list[Message] = [{"role": "system", "content": system}] if system is not None else []
    while (content := asked if asked is not None else next_line()) is not None:
        messages.append({"role": "user", "content": content})
        answer = show(run([chat.encode(messages)], ends=chat.ends), say)
        messages.append({"role": "assistant", "content": answer})
        if asked is not None:
            return


def show(pieces: Any, say: Callable[..., None]) -> str:
    """Print a text's pieces as they come; the text."""
    text = ""
    for _, piece in pieces:
        say(piece, end="", flush=True)
        text += piece
    say()
    return text


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this command as it ends others
    main_guard(main)
