"""RUN/.lock, beside what whole commands show of it (test_train_command.py)."""

from pathlib import Path

import pytest

from megalm.errors import MegalmError
from megalm.training.lock import Lock


def test_a_folder_that_cannot_be_made_or_written_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(MegalmError, match=r"file/run/.lock cannot be written \(Not a directory\): mend its permiss"):
        Lock(tmp_path / "file" / "run").acquire()
    (tmp_path / "run" / ".lock").mkdir(parents=True)
    with pytest.raises(MegalmError, match=r"run/.lock cannot be written \(Is a directory\)"):
        Lock(tmp_path / "run").acquire()
