"""Continue a text with a trained model."""

import argparse
import signal
import sys

from megalm.errors import MegalmError, main_guard


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("path", metavar="RUN", help="run folder (its newest checkpoint) or RUN/checkpoints/step-N")
    parser.add_argument("--prompt", metavar="TEXT", help="default: standard input")
    parser.add_argument(
        "--max-new-tokens", type=int, default=200, metavar="N", help="stop after so many (default: %(default)s)"
    )
    parser.add_argument(
        "--temperature", type=float, default=0.8, metavar="T", help="0 is greedy, 1 the model's own (default: 0.8)"
    )
    parser.add_argument("--top-k", type=int, metavar="K", help="draw from the K most likely tokens (default: all)")
    parser.add_argument(
        "--top-p",
        type=float,
        metavar="P",
        help="draw from the fewest tokens whose probabilities reach P (default: all)",
    )
    parser.add_argument("--greedy", action="store_true", help="always take the most likely token")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="the same seed, the same text (default: 0)")
    parser.add_argument(
        "--device", choices=["auto", "cpu", "cuda"], default="auto", help="default: a GPU if there is one"
    )
    parser.add_argument("--tokenizer", metavar="PATH", help="where it is, if it moved since the run")
    arguments = parser.parse_args()
    prompt = read_prompt() if arguments.prompt is None else arguments.prompt

    import torch  # from here on imports take seconds

    from megalm.eval.generate import Sampling, encode_prompt, generate
    from megalm.eval.load import load_model

    sampling = Sampling(0.0 if arguments.greedy else arguments.temperature, arguments.top_k, arguments.top_p)
    device = arguments.device
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    model, config, tokenizer = load_model(arguments.path, device=device, tokenizer=arguments.tokenizer)
    length, context = len(encode_prompt(tokenizer, prompt)), config.max_position_embeddings
    if length > context:
        print(f"note: the model sees the last {context} of the prompt's {length} tokens", file=sys.stderr)
    print(prompt, end="", flush=True)
    for piece in generate(
        model,
        config,
        tokenizer,
        prompt,
        max_new_tokens=arguments.max_new_tokens,
        sampling=sampling,
        seed=arguments.seed,
    ):
        print(piece, end="", flush=True)
    print()


def read_prompt() -> str:
    """All of standard input, without the end of its last line."""
    if sys.stdin.isatty():
        print("type the prompt, then Ctrl-D on a line of its own", file=sys.stderr)
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        raise MegalmError(f"the prompt on standard input is not UTF-8 text (at byte {error.start})") from None


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `| head` ends this command as it ends others
    main_guard(main)
