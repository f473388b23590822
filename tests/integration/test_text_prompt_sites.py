"""A text prompt searched by sites that each ask an endpoint of their own: only candidates and scores cross."""

from __future__ import annotations

import pytest

from fedllm.app.run import run
from fedllm.runtime.line import Line, encode
from tests.endpoints import served, tiny_app
from tests.federations import desks, line_to, make_site
from tests.integration.test_federation import federate
from tests.integration.test_text_prompt_away import SILOS, recipe_for, rounds_in

NOBODY = "http://127.0.0.1:9/v1"


class Counting:
    """An application that counts the requests that it serves."""

    def __init__(self):
        self.app, self.asked = tiny_app(), 0

    async def __call__(self, scope, receive, send):
        self.asked += scope["type"] == "http" and scope["method"] == "POST"
        await self.app(scope, receive, send)


def test_each_site_asks_its_own_endpoint_and_scores_what_one_machine_scores(tmp_path):
    apps = {name: Counting() for name in SILOS}
    with served(apps["a"]) as a, served(apps["b"]) as b:
        recipe = recipe_for(tmp_path, a, {"proposer": "critique"})
        here = run(recipe, tmp_path / "here")
        before = {name: app.asked for name, app in apps.items()}
        assert before["b"] == 0 < before["a"]

        # The address in the recipe is the server's business; a site's text goes where the site says.
        away = recipe.model_copy(update={"endpoint": recipe.endpoint.model_copy(update={"url": NOBODY})})
        data = f'train = "{tmp_path}/{{}}.jsonl"'
        files = [
            make_site(tmp_path / f"site_{name}", name, data.format(name), "endpoint", own=f'url = "{url}"')
            for name, url in (("a", a), ("b", b))
        ]
        heard = list[bytes]()
        with desks(files) as sites:
            plain = line_to(sites)

            def call(site, head, body, seconds):
                answer = plain.call(site, head, body, seconds)
                heard.append(encode(answer[0]) + bytes(answer[1]))
                return answer

            far = federate(tmp_path / "far", away, Line(call, plain.sites), list(SILOS))
        assert all(app.asked > before[name] for name, app in apps.items())

    # What a critique is answered is drawn by chance at the endpoint, so that later candidates may be others.
    event, expected = rounds_in(far)[0], rounds_in(here)[0]
    assert event["prompt"] == expected["prompt"] and event["calls"] == expected["calls"]
    assert event["train_loss"] == pytest.approx(expected["train_loss"], abs=1e-4)
    assert not any(b"the cat" in each or b"the mat" in each for each in heard)
