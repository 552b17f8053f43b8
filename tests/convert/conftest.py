"""A tokenizer that megalm trained, with a chat template beside it."""

from pathlib import Path
from pydoc_data.topics import topics

import pytest

from megalm.convert.gate import TEXT
from megalm.tokenizer.train import train

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"


@pytest.fixture(scope="session")
def tokenizer_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    train(lambda: [*topics.values(), TEXT * 20], 600).save(folder)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder
