"""Generation picks what Hugging Face's picks, draws as the definitions say, and prints whole characters."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from megalm.errors import MegalmError
from megalm.eval import inference
from megalm.eval.generate import (
    Generation,
    Sampling,
    Text,
    collect,
    encode_prompt,
    generate,
    penalize,
    probabilities,
)
from megalm.eval.inference import Reading, next_logits
from megalm.models.config import ModelConfig
from megalm.models.decoder import LayerList
from megalm.tokenizer.base import Tokenizer
from megalm.tokenizer.load import load
from megalm.tokenizer.train import train

GREEDY = Sampling(temperature=0)
MakeModel = Callable[..., tuple[LayerList, ModelConfig]]

NAMES = {
    "embedding.table": "model.embed_tokens",
    "blocks.": "model.layers.",
    "feed_forward_norm": "post_attention_layernorm",
    "attention_norm": "input_layernorm",
    ".attention.query": ".self_attn.q_proj",
    ".attention.key": ".self_attn.k_proj",
    ".attention.value": ".self_attn.v_proj",
    ".attention.output": ".self_attn.o_proj",
    ".feed_forward": ".mlp",
    "norm.norm": "model.norm",
    "head.": "lm_head.",
}
MLP = {".mlp.gate": ".mlp.gate_proj", ".mlp.up": ".mlp.up_proj", ".mlp.down": ".mlp.down_proj"}


def llama(model: LayerList, config: ModelConfig) -> transformers.LlamaForCausalLM:
    """Hugging Face's model with the same weights."""
    vocab = config.vocab_size
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=vocab,
            hidden_size=config.hidden_size,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            num_hidden_layers=config.num_layers,
            intermediate_size=config.intermediate_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.norm_eps,
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=0,
        )
    )
    state = {}
    for name, tensor in model.named_weights().items():
        if "table" in name or name.startswith("head."):
            tensor = tensor[:vocab]
        for ours, other in (NAMES | MLP).items():
            name = name.replace(ours, other)
        state[name] = tensor
    theirs.load_state_dict(state)
    return theirs.eval()


def ids(
    model: LayerList,
    prompt: Sequence[int],
    *,
    context: int = 64,
    vocab_size: int = 257,
    eos_id: int | None = None,
    max_new_tokens: int = 24,
    sampling: Sampling = GREEDY,
    seed: int = 0,
) -> list[int]:
    return batch_ids(
        model,
        [prompt],
        context=context,
        vocab_size=vocab_size,
        ends=[] if eos_id is None else [eos_id],
        max_new_tokens=max_new_tokens,
        sampling=sampling,
        seed=seed,
    )[0]


def batch_ids(model: LayerList, several: Sequence[Sequence[int]], **changes: Any) -> list[list[int]]:
    options = {"context": 64, "vocab_size": 257, "ends": [], "max_new_tokens": 24, "sampling": GREEDY, "seed": 0}
    rows = Generation(model, several, **options | changes)
    new: list[list[int]] = [[] for _ in several]
    while rows.active:
        for row, token in rows.step().items():
            new[row].append(token)
    return new


def prompts(count: int) -> list[list[int]]:
    draw = torch.Generator().manual_seed(4)
    lengths = [1, 2, 7, 30, 40][:count]
    return [torch.randint(0, 256, (length,), generator=draw).tolist() for length in lengths]


def test_greedy_equals_hugging_face(make_model: MakeModel) -> None:
    model, config = make_model()
    theirs = llama(model, config)
    differ = []
    for prompt in prompts(5):
        inputs = torch.tensor([prompt])
        out = theirs.generate(inputs, attention_mask=torch.ones_like(inputs), max_new_tokens=24, do_sample=False)
        expected = out[0, len(prompt) :].tolist()
        assert len(set(expected)) > 3, "a model that repeats itself would hide mistakes"
        assert ids(model, prompt) == expected
        # negative control: a context a little too short is seen
        differ.append(ids(model, prompt, context=len(prompt) + 3) != expected)
    assert all(differ)


def test_a_kernel_named_for_training_does_not_stop_generation(make_model: MakeModel) -> None:
    """As a run's own model has one when its held-out rows are answered; this one knows no cache of keys."""
    prompt = prompts(3)[2]
    expected = ids(make_model()[0], prompt)
    model, _ = make_model(attention_backend="blocks")
    assert ids(model, prompt) == expected
    tokens = torch.arange(8)[None]
    with pytest.raises(MegalmError, match="attention_backend blocks cannot serve this run"):
        model((tokens, torch.zeros_like(tokens), tokens, torch.zeros(1, dtype=torch.long)))


def test_beyond_the_context_the_last_tokens_count(make_model: MakeModel) -> None:
    """Every token is the most likely one after the 16 before it, in Hugging Face's model."""
    model, config = make_model(max_position_embeddings=16)
    theirs = llama(model, config)
    prompt = prompts(4)[3]
    everything = prompt + ids(model, prompt, context=16)
    for end in range(len(prompt), len(everything)):
        with torch.no_grad():
            logits = theirs(torch.tensor([everything[end - 16 : end]])).logits[0, -1]
        assert everything[end] == logits.argmax()


@pytest.mark.parametrize("position", ["learned", "sinusoidal", "alibi"])
def test_the_context_fits_every_kind_of_position(make_model: MakeModel, position: str) -> None:
    """A learned table has no row beyond max_position_embeddings."""
    model, config = make_model(position=position, max_position_embeddings=16)
    assert len(ids(model, prompts(4)[3], context=config.max_position_embeddings)) == 24


def test_top_k_and_top_p_by_hand() -> None:
    logits = torch.tensor([0.1, 0.4, 0.2, 0.3]).log() + 5.0

    def drawn_with(**choice: Any) -> list[float]:
        return probabilities(logits, Sampling(**choice)).tolist()

    assert drawn_with() == pytest.approx([0.1, 0.4, 0.2, 0.3])
    assert drawn_with(top_k=2) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert drawn_with(top_k=1) == [0, 1, 0, 0]
    assert drawn_with(top_k=9) == pytest.approx([0.1, 0.4, 0.2, 0.3])
    # 0.4 + 0.3 reach 0.65 together, and 0.4 + 0.3 + 0.2 reach 0.75
    assert drawn_with(top_p=0.65) == pytest.approx([0, 4 / 7, 0, 3 / 7])
    assert drawn_with(top_p=0.75) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9])
    assert drawn_with(top_p=0.01) == [0, 1, 0, 0]
    assert drawn_with(top_p=1.0) == pytest.approx([0.1, 0.4, 0.2, 0.3])
    # of the two that top_k leaves, the first has 4/7 alone
    assert drawn_with(top_k=2, top_p=0.55) == [0, 1, 0, 0]
    # half the temperature squares the ratios
    assert drawn_with(temperature=0.5) == pytest.approx([1 / 30, 16 / 30, 4 / 30, 9 / 30])
    assert drawn_with(temperature=1e-30) == [0, 1, 0, 0]
    # among equals the lowest ids come first, and exactly k stay
    assert probabilities(torch.zeros(4), Sampling(top_k=3)).tolist() == pytest.approx([1 / 3, 1 / 3, 1 / 3, 0])


@pytest.mark.parametrize(
    "choice",
    [
        {"temperature": 0.7, "top_k": 5},
        {"temperature": 1.3, "top_p": 0.9},
        {"temperature": 0.8, "top_k": 20, "top_p": 0.5},
        {"top_k": 3, "top_p": 0.3},
        {"temperature": 0.9, "min_p": 0.1},
        {"temperature": 1.5, "top_k": 40, "top_p": 0.9, "min_p": 0.07},
        {"repetition_penalty": 1.7},
        {"temperature": 1.3, "top_k": 12, "top_p": 0.9, "min_p": 0.3, "repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_sampling_equals_hugging_face(choice: dict[str, Any]) -> None:
    draw = torch.Generator().manual_seed(5)
    logits = torch.randn(3, 300, generator=draw) * 3
    held = torch.randint(0, 300, (3, 40), generator=draw)

    def ours(**choice: Any) -> torch.Tensor:
        sampling = Sampling(**choice)
        return probabilities(penalize(logits, held.tolist(), sampling.repetition_penalty), sampling)

    scores = RepetitionPenaltyLogitsProcessor(choice.get("repetition_penalty", 1.0))(held, logits.clone())
    scores = TemperatureLogitsWarper(choice.get("temperature", 1.0))(held, scores)
    for kind, name in ((TopKLogitsWarper, "top_k"), (TopPLogitsWarper, "top_p"), (MinPLogitsWarper, "min_p")):
        if name in choice:
            scores = kind(choice[name])(held, scores)
    torch.testing.assert_close(ours(**choice), scores.softmax(-1))
    for name in choice if len(choice) < 4 else ():  # negative control: each counts, where others leave it something
        assert not torch.allclose(ours(**{k: v for k, v in choice.items() if k != name}), scores.softmax(-1), atol=1e-4)


def test_draws_follow_the_distribution(make_model: MakeModel) -> None:
    """2,000 first tokens against the model's own probabilities, by Pearson's chi-squared test."""
    model, _ = make_model()
    sampling = Sampling(temperature=0.7, top_k=6)
    logits = next_logits(model, [[65, 66]])
    expected = probabilities(logits[0, :257], sampling)
    counts = torch.zeros(257)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reading, "read", lambda *_: logits)  # the same every time
        for token in ids(model, [65, 66], max_new_tokens=2000, sampling=sampling):
            counts[token] += 1
    kept = expected > 0
    assert kept.sum() == 6 and counts[~kept].sum() == 0

    def statistic(probability: torch.Tensor) -> float:
        mean = 2000 * probability[kept]
        return ((counts[kept] - mean) ** 2 / mean).sum().item()

    assert statistic(expected) < 20.5  # one in a thousand exceeds it, with five degrees of freedom
    assert statistic(probabilities(logits[0, :257], Sampling(temperature=2.0, top_k=6))) > 20.5  # negative control


def test_the_seed_decides(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    model, config = make_model()

    def text(seed: int) -> str:
        return collect(generate(model, config, tokenizer, [[65, 66]], max_new_tokens=30, seed=seed), 1)[0]

    torch.manual_seed(1)
    first = text(0)
    torch.manual_seed(2)  # nobody else's random state enters
    assert text(0) == first
    assert text(1) != first
    # greedy, and one token of top_k, need none
    assert ids(model, [1], seed=0) == ids(model, [1], seed=1)
    assert ids(model, [1], sampling=Sampling(top_k=1), seed=7) == ids(model, [1])


def test_stops_at_the_end_of_the_document_and_at_max_new_tokens(make_model: MakeModel) -> None:
    model, _ = make_model()
    free = ids(model, [65, 66])
    assert len(free) == 24
    end = next(token for place, token in enumerate(free) if place > 3 and token not in free[:place])
    assert ids(model, [65, 66], eos_id=end) == free[: free.index(end)]
    assert ids(model, [65, 66], max_new_tokens=5) == free[:5]
    assert ids(model, [65, 66], max_new_tokens=0) == []
    assert ids(model, [65, 66], eos_id=free[0]) == []


def test_ids_that_the_tokenizer_lacks_are_never_chosen(make_model: MakeModel) -> None:
    model, _ = make_model()
    limit = sorted(ids(model, [65, 66]))[12]
    assert max(ids(model, [65, 66], vocab_size=limit)) < limit
    assert max(ids(model, [65, 66], vocab_size=limit, sampling=Sampling())) < limit


def test_a_diverged_model_is_refused(make_model: MakeModel) -> None:
    model, _ = make_model()
    with torch.no_grad():
        model.named_weights()["norm.norm.weight"][0] = torch.nan
    with pytest.raises(MegalmError, match="logits are not finite, its training diverged: use an earlier checkpoint"):
        ids(model, [65])


@pytest.mark.parametrize(
    ("choice", "words"),
    [
        ({"temperature": -1.0}, "temperature -1.0"),
        ({"temperature": float("nan")}, "temperature nan"),
        ({"top_k": 0}, "top-k 0"),
        ({"top_p": 0.0}, "top-p 0.0"),
        ({"top_p": 1.5}, "top-p 1.5"),
        ({"min_p": -0.1}, "min-p -0.1"),
        ({"repetition_penalty": 0.0}, "repetition penalty 0.0"),
    ],
)
def test_sampling_out_of_range_is_refused(choice: dict[str, Any], words: str) -> None:
    with pytest.raises(MegalmError, match=words):
        Sampling(**choice)


def test_a_prompt_begins_as_documents_do(
    tokenizer: Tokenizer, make_tokenizer: Callable[..., Path], tmp_path: Path
) -> None:
    plain = tokenizer.encode("ab")
    assert encode_prompt(tokenizer, "ab") == plain
    assert encode_prompt(tokenizer, "") == [tokenizer.eos_id]
    with_begin = load(make_tokenizer(tmp_path / "begin", ("</s>", "<s>"), begin="<s>"))
    assert encode_prompt(with_begin, "ab") == [with_begin.bos_id, *plain]
    assert encode_prompt(with_begin, "") == [with_begin.bos_id]
    # GPT-2's one token for both ends documents only
    gpt2 = load(make_tokenizer(tmp_path / "gpt2", ("<|endoftext|>",), begin="<|endoftext|>"))
    assert encode_prompt(gpt2, "ab") == plain


TEXTS = ["naïve 语言 👩‍👩‍👧 e\u0301\n", "\u2028 ▁ \ufffd end", "🏳️‍🌈" * 3]


def pieces(tokenizer: Tokenizer, prompt: str, new: Sequence[int], stop: Sequence[str] = ()) -> Iterator[str]:
    text = Text(tokenizer, tokenizer.encode(prompt), stop)
    for token in new:
        if piece := text.add(token):
            yield piece
        if text.stopped:
            break
    if rest := text.end():
        yield rest


@pytest.fixture(scope="module")
def sentencepiece_tokenizer() -> Tokenizer:
    return train(lambda: ["only plain letters here, so that all else is bytes"] * 50, 310, "bpe")


@pytest.mark.parametrize("kind", ["tokenizer", "sentencepiece_tokenizer"])
@pytest.mark.parametrize("text", TEXTS)
def test_streaming_prints_whole_characters_as_they_come(kind: str, text: str, request: pytest.FixtureRequest) -> None:
    tokenizer = request.getfixturevalue(kind)
    new = tokenizer.encode(text)
    assert len(new) > len(text), "characters of several ids"
    for prompt in ("", "ab", "语", "a\ufffd"):
        streamed = list(pieces(tokenizer, prompt, new))
        assert "".join(streamed) == text
        assert all(piece.count("\ufffd") <= text.count("\ufffd") for piece in streamed)
        # as soon as they are whole, not at the end
        whole = [piece for piece in streamed if "\ufffd" not in piece]
        assert all(len(piece) == 1 for piece in whole) and len(streamed) >= len(text) - 2


def test_streaming_id_by_id_would_break_characters(tokenizer: Tokenizer) -> None:
    """Negative control: what the test above forbids happens without holding back."""
    new = tokenizer.encode("语言")
    texts = [tokenizer.decode(new[:count]) for count in range(len(new) + 1)]
    naive = [after[len(before) :] for before, after in pairwise(texts)]
    assert "\ufffd" in "".join(naive)


def test_bytes_that_never_become_a_character_are_shown_as_such(tokenizer: Tokenizer) -> None:
    lead, *_ = tokenizer.encode("语")
    letter = tokenizer.encode("x")[0]
    assert list(pieces(tokenizer, "a", [lead, letter])) == ["\ufffdx"]
    assert list(pieces(tokenizer, "a", [letter, lead])) == ["x", "\ufffd"]
    assert list(pieces(tokenizer, "a", [])) == []


def test_text_of_random_ids_is_the_decoded_whole(tokenizer: Tokenizer, sentencepiece_tokenizer: Tokenizer) -> None:
    draw = torch.Generator().manual_seed(6)
    for either in (tokenizer, sentencepiece_tokenizer):
        for length in (40, 40, 100) * 10:
            new = torch.randint(0, either.vocab_size, (length,), generator=draw).tolist()
            streamed = list(pieces(either, "a", new))
            assert "a" + "".join(streamed) == either.decode([*either.encode("a"), *new])


def test_text_comes_before_generation_ends(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    model, config = make_model()
    calls = 0
    original = Reading.read

    def counted(*arguments: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return original(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Reading, "read", counted)
        stream = generate(model, config, tokenizer, [[65, 66]], max_new_tokens=50)
        assert next(stream)[1]
        assert calls < 25
    assert not torch.is_inference_mode_enabled()


def test_stop_strings_end_the_text_before_them(tokenizer: Tokenizer) -> None:
    new = tokenizer.encode("one two\n\nthree END")
    assert "".join(pieces(tokenizer, "", new, ["END", "\n\n"])) == "one two"
    assert "".join(pieces(tokenizer, "", new, ["three", "two\n"])) == "one "
    assert "".join(pieces(tokenizer, "", new, ["absent", ""])) == "one two\n\nthree END"
    # what may be a stop string's beginning waits, and comes when it is not, or at the end
    streamed = list(pieces(tokenizer, "", tokenizer.encode("a\nb\n"), ["\n\n"]))
    assert streamed == ["a", "\nb", "\n"]
    assert list(pieces(tokenizer, "", tokenizer.encode("aab"), ["ab"])) == ["a"]


def test_a_batch_gives_what_each_prompt_gives_alone(make_model: MakeModel) -> None:
    model, _ = make_model()
    several = prompts(5)
    for sampling in (GREEDY, Sampling(0.8, top_p=0.9, repetition_penalty=1.2)):
        alone = [ids(model, prompt, sampling=sampling, seed=7 + number) for number, prompt in enumerate(several)]
        assert batch_ids(model, several, sampling=sampling, seed=7) == alone
        # rows that end leave the others as they are
        end = alone[2][5]
        until = [row[: row.index(end)] if end in row else row for row in alone]
        assert batch_ids(model, several, sampling=sampling, seed=7, ends=[end]) == until
        # and rows that outgrow the context
        alone = [
            ids(model, prompt, sampling=sampling, seed=number, context=35) for number, prompt in enumerate(several)
        ]
        assert batch_ids(model, several, sampling=sampling, context=35) == alone


def test_a_batch_in_hugging_face_gives_the_same(make_model: MakeModel) -> None:
    model, config = make_model()
    several = prompts(5)
    longest = max(map(len, several))
    padded = torch.tensor([[0] * (longest - len(row)) + row for row in several])
    mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in several])
    for penalty in (1.0, 1.3):
        out = llama(model, config).generate(
            padded, attention_mask=mask, max_new_tokens=20, do_sample=False, repetition_penalty=penalty
        )
        # padding counts as an id that the row holds in their penalty, not in ours: rows without padding are compared
        rows = [row for row in range(5) if penalty == 1 or len(several[row]) == longest]
        ours = batch_ids(model, several, sampling=Sampling(0, repetition_penalty=penalty), max_new_tokens=20)
        assert [ours[row] for row in rows] == [out[row, longest:].tolist() for row in rows]


def test_stop_strings_in_a_batch(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    model, config = make_model()
    several = prompts(4)
    run = partial(generate, model, config, tokenizer, max_new_tokens=20, sampling=GREEDY)
    whole = collect(run(several), 4)
    stop = whole[1][6:8]
    expected = [text.split(stop)[0] for text in whole]
    assert collect(run(several, stop=[stop]), 4) == expected != whole
    calls = []
    with pytest.MonkeyPatch.context() as patch:  # a row that stopped costs nothing more
        original = inference.hidden_states
        patch.setattr(inference, "hidden_states", lambda *given: calls.append(len(given[1])) or original(*given))
        collect(run(several, stop=[stop]), 4)
    assert calls[0] == 4 and calls[-1] < 4


def test_no_new_tokens(make_model: MakeModel, tokenizer: Tokenizer) -> None:
    model, config = make_model()
    assert collect(generate(model, config, tokenizer, [[65]], max_new_tokens=0), 1) == [""]
