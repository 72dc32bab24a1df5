"""The shortest use of every paper's module, as its page shows it: it runs, without a network, and prints something."""
import contextlib
import io
import socket

import pytest

from conftest import HOME
from researchkit.core.notebook import paper_paths, read_paper

PAPERS = paper_paths(HOME)
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize("slug", PAPERS)
def test_the_shortest_use(slug, tmp_path, monkeypatch):
    paper = read_paper(PAPERS[slug])
    assert paper.use, f"{slug}: front matter has no paper.use"

    def refuse(*arguments, **options):
        raise OSError("a snippet uses no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(paper.use, f"{slug}: paper.use", "exec"), {"__name__": "__main__"})
    assert printed.getvalue().strip()
