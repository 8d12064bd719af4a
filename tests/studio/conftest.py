"""A studio that serves an untrained model, and its page."""

from __future__ import annotations

import pytest
from studio_page import PORT, TOKEN, Page, make_run, page_files

from undiffuse.studio.runs import open_runs
from undiffuse.studio.server import Studio, build_app


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("studio") / "digits-run")


@pytest.fixture
def studio(run_folder):
    made = Studio(open_runs([run_folder]), page_files())
    yield made
    made.queue.close()


@pytest.fixture
def page(studio):
    app = build_app(studio, PORT, TOKEN)
    with Page(app, base_url=f"http://127.0.0.1:{PORT}", headers={"X-Studio-Token": TOKEN}) as client:
        yield client
