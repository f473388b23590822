"""What several unit tests share."""

import pytest


@pytest.fixture
def desk(tmp_path):
    """A site's desk that was asked for the run r1."""
    from tests.desks import ask, desk_in

    with desk_in(tmp_path) as desk:
        ask(desk)
        yield desk
