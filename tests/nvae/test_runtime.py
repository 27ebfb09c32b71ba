import os
import stat

import pytest
import torch

from nvae import runtime


def test_processes_do_not_share_a_gpu_named_by_number(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="would put all 2 processes on one GPU"):
        runtime.this_process("cuda:0")


def test_a_folder_is_kept_to_one_run_until_that_ends(tmp_path):
    here = runtime.Runtime(torch.device("cpu"))
    with runtime.kept(tmp_path, here):
        with pytest.raises(ValueError, match="another process is running in"):
            with runtime.kept(tmp_path, here):
                pass
        with runtime.kept(tmp_path, runtime.Runtime(torch.device("cpu"), rank=1)):
            pass  # the other processes of the same run
    with runtime.kept(tmp_path, here):
        pass


def test_a_run_that_is_refused_leaves_no_new_folder_behind(tmp_path):
    here = runtime.Runtime(torch.device("cpu"))

    def refused(folder):
        with runtime.kept(folder, here):
            raise ValueError("bad flags")

    for folder, there in ((tmp_path / "new", False), (tmp_path, True)):
        with pytest.raises(ValueError, match="bad flags"):
            refused(folder)
        assert folder.exists() == there


def test_a_file_appears_whole_or_not_at_all_and_as_readable_as_the_umask_says(tmp_path):
    path = tmp_path / "new" / "file.txt"

    def broken():
        with runtime.written_whole(path) as temporary:
            temporary.write_text("half")
            raise RuntimeError("a full disk, say")

    with pytest.raises(RuntimeError, match="a full disk"):
        broken()
    assert list(path.parent.iterdir()) == []
    with runtime.written_whole(path) as temporary:
        temporary.write_text("whole")
        temporary.chmod(0o600)  # as the writers of some formats do
    assert path.read_text() == "whole"
    umask = os.umask(0)
    os.umask(umask)
    assert stat.S_IMODE(path.stat().st_mode) == 0o666 & ~umask


def test_what_a_user_can_cause_is_one_line_and_status_2(capsys):
    def broken():
        raise ValueError("got 1, expected 2")

    assert runtime.exit_status(broken) == 2
    assert capsys.readouterr().err == "error: got 1, expected 2\n"
    assert runtime.exit_status(lambda: None) == 0
