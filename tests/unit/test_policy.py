"""A site's file and what its rules say to recipes: each by its name, with what the site allows."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import fedllm
from fedllm.app.catalog import CATALOG
from fedllm.app.site import own_recipe
from fedllm.core.errors import FedllmError, Refused
from fedllm.federation.site.policy import KINDS, Policy, read_site
from fedllm.federation.site.rules import check, clipped_at, facts, governing, recipe_sha256, refusals
from tests.desks import recipe, site_in

ONE, TWO = "1" * 64, "2" * 64


def asked(user="admin@example.org", version=fedllm.__version__, weights=ONE, algorithm=("fedavg",), **changes):
    said = {"recipe": recipe(**changes), "algorithm": list(algorithm), "user": user, "fedllm": version}
    return facts(said | {"model_sha256": weights})


def refusal(folder, run, models=None, weights=None, **policy):
    return check(site_in(folder, models, **policy), run, CATALOG, weights)


def clip(norm):
    return {"name": "clip", "max_norm": norm}


def test_a_site_that_says_nothing_allows_what_is_known(tmp_path):
    assert refusal(tmp_path, asked()) is None
    assert governing(site_in(tmp_path)) == ["metrics"]


def test_a_site_names_the_api_and_the_variable_of_its_key_itself(tmp_path):
    told = recipe(model="endpoint", endpoint={"url": "https://elsewhere.example/v1", "model": "m", "key_env": "SECRET"})
    file, text = tmp_path / "site.toml", 'name = "a"\n[data]\ntrain = "a.jsonl"\n[models]\nendpoint = {}\n'
    file.write_text(text.format("{}"))
    with pytest.raises(FedllmError, match="names no API"):
        own_recipe(told, file)
    for more, key in (("", None), (', key_env = "OURS"', "OURS")):
        file.write_text(text.format(f'{{ url = "https://ours.example/v1"{more} }}'))
        own = own_recipe(told, file).endpoint
        assert (own.url, own.key_env) == ("https://ours.example/v1", key)


@pytest.mark.parametrize(("own", "asked", "used"), [(2, 1, 2), (None, 1, 1), (None, None, None)])
def test_threads_are_those_of_the_site_and_else_of_the_recipe(tmp_path, own, asked, used):
    said = f"threads = {own}\n" if own else ""
    (tmp_path / "site.toml").write_text(f'name = "a"\n{said}[data]\ntrain = "a.jsonl"\n')
    told = recipe() | ({"threads": asked} if asked else {})
    assert own_recipe(told, tmp_path / "site.toml").threads == used


CENTRAL = {"name": "central_dp", "max_norm": 1.0, "noise": 1.0}
LOCAL = {"name": "local_dp", "max_norm": 1.0, "noise": 20.0}
TOGETHER = {"name": "distributed_dp", "max_norm": 1.0, "noise": 20.0}
NO = [
    ("version", {}, {"version": "0.2.0"}, r"works with fedllm 0\.1, the server with '0\.2\.0'; install the same"),
    ("recipes", {"recipes": (ONE,)}, {}, r"allows certain recipes only.*[0-9a-f]{64}.*policy\.recipes"),
    ("users", {"users": ("eve@example.org",)}, {}, r"a lets eve@example\.org start runs; .*'admin@example\.org'"),
    ("algorithms", {"algorithms": ("fedprox",)}, {}, r"allows the algorithms fedprox; this recipe has 'fedavg'"),
    ("trainables", {"trainables": ("lora", "dora")}, {"trainable": {"name": "full"}}, r"lora, dora; .*'full'"),
    ("tasks", {"tasks": ("classify",)}, {}, r"allows the tasks classify; this recipe has 'instruct'"),
    ("clients", {"clients": ()}, {}, r"allows the clients none; this recipe has 'local_training'"),
    ("selects", {"selects": ("poisson",)}, {}, r"allows the selects poisson; this recipe has 'everyone'"),
    ("shares", {"shares": ("fragments",)}, {}, r"allows the shares fragments; this recipe has 'everything'"),
    ("aggregates", {"aggregates": ()}, {}, r"allows the aggregates none"),
    ("optimisers", {"optimisers": ("fedadam",)}, {}, r"allows the optimisers fedadam; this recipe has 'fedavg'"),
    ("transforms", {"transforms": ("clip",)}, {"transforms": [clip(1), {"name": "cast"}]}, r"clip; .*'cast'"),
    ("rounds_a_run", {"rounds_a_run": 99}, {}, r"a allows 99 rounds a run; this recipe has 100\."),
    ("clip", {"clip": 1}, {}, r"clipped at a norm of 1 or lower.*this recipe does not end in a clip"),
    ("clip", {"clip": 1}, {"transforms": [clip(1.01)]}, r"this recipe clips at 1\.01"),
    ("epsilon", {"epsilon": 8.0}, {}, r"worth epsilon 8 or lower, such as client\.name = 'dp_sgd'.*recipe adds none"),
    (
        "epsilon",
        {"epsilon": 8.0},
        {"transforms": [CENTRAL]},
        r"at the server only, which policy\.trust_server does not",
    ),
    (
        "epsilon",
        {"epsilon": 8.0},
        {"transforms": [LOCAL]},
        r"own model is told of without any; set evaluate\.alone = f",
    ),
    ("duplicates", {"duplicates": False}, {"duplicates": {}}, r"a lets no hashes of its texts leave"),
    ("epsilon", {"epsilon": 8.0}, {"transforms": [TOGETHER], "secure": {}}, r"policy\.trust_sites does not count"),
    (
        "epsilon",
        {"epsilon": 8.0},
        {"client": {"name": "dp_sgd", "noise_in": "sum"}, "secure": {}},
        r"each site add its part of the noise",
    ),
    ("epsilon", {"epsilon": 8.0, "trust_sites": True}, {"transforms": [TOGETHER]}, r"trust_sites does not count"),
    ("secure_aggregation", {"secure_aggregation": True}, {}, r"could read by itself; add \[secure\]"),
    ("secure_aggregation", {"secure_aggregation": True}, {"homomorphic": {}}, r"add \[secure\].*one other site"),
]


@pytest.mark.parametrize(("rule", "policy", "run", "sentence"), NO, ids=[f"{no[0]}-{n}" for n, no in enumerate(NO)])
def test_each_rule_refuses_by_its_name_and_says_what_is_allowed(tmp_path, rule, policy, run, sentence):
    found = refusal(tmp_path, asked(**run), **policy)
    assert found.rule == rule and re.search(sentence, found.sentence), found


def test_sums_and_noise_in_them_are_enough_for_a_site_that_trusts_the_others(tmp_path):
    run = asked(transforms=[TOGETHER], secure={}, evaluate={"alone": False})
    assert refusal(tmp_path, run, secure_aggregation=True, clip=1.0, epsilon=8.0, trust_sites=True) is None


def test_every_key_of_the_policy_that_a_recipe_can_break_is_tried_here():
    later = {"rounds_a_day", "tokens_a_day", "metrics", "max_message_mb"}
    later |= {"delta", "trust_server", "trust_sites"}  # They say how epsilon is counted.
    assert {rule for rule, *_ in NO} == Policy.model_fields.keys() - later | {"version"}


@pytest.mark.parametrize("rule", KINDS)
def test_a_name_that_the_catalogue_has_not_is_refused_with_the_nearest(tmp_path, rule):
    kind = KINDS[rule]
    name = f"{min(CATALOG[kind])}x"
    part = {"name": name, "max_norm": 1.0}
    found = refusal(tmp_path, asked(**{kind: [part] if kind == "transforms" else part}))
    assert found.rule == rule and f"has '{name}'; did you mean '{min(CATALOG[kind])}'?" in found.sentence


def test_a_recipe_on_the_list_is_allowed_by_the_hash_of_its_canonical_json(tmp_path):
    assert refusal(tmp_path, asked(), recipes=(recipe_sha256(recipe()),)) is None
    assert recipe_sha256({"b": 1, "a": [1.5]}) == recipe_sha256({"a": [1.5], "b": 1})
    assert recipe_sha256({}) == "44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"


def test_a_base_model_is_allowed_by_name_and_by_its_weights(tmp_path):
    name = recipe()["model"]
    other = refusal(tmp_path, asked(), {"my-model": {}})
    assert other.rule == "models" and f"allows the models my-model; this recipe has '{name}'" in other.sentence
    assert refusal(tmp_path, asked(), {name: {"sha256": ONE}}) is None
    weights = refusal(tmp_path, asked(weights=TWO), {name: {"sha256": ONE}})
    assert weights.rule == "models" and "get the same weights" in weights.sentence
    assert refusal(tmp_path, asked(), {name: {"path": "/m"}}, {"/m": ONE}.__getitem__) is None
    assert refusal(tmp_path, asked(), None, {name: TWO}.__getitem__).rule == "models"

    def gone(place):
        raise FedllmError(f"There is no model '{place}'.")

    assert "There is no model '/m'" in refusal(tmp_path, asked(), {name: {"path": "/m"}}, gone).sentence


def test_no_weights_are_looked_at_for_a_recipe_that_is_refused_anyway(tmp_path):
    def looked(place):
        raise AssertionError(place)

    assert refusal(tmp_path, asked(), None, looked, users=()).rule == "users"


def test_all_that_is_against_a_recipe_is_said(tmp_path):
    site = site_in(tmp_path, users=(), secure_aggregation=True)
    assert [found.rule for found in refusals(site, asked(), CATALOG)] == ["users", "secure_aggregation"]


def test_a_clip_counts_only_where_nothing_after_it_can_make_the_update_longer():
    assert clipped_at([clip(2), clip(1), {"name": "cast"}]) == 1
    assert clipped_at([clip(1), clip(2)]) == 1
    assert clipped_at([{"name": "top_k", "fraction": 0.1}, clip(1)]) == 1
    # What top-k kept back in earlier rounds is added.
    assert clipped_at([clip(1), {"name": "top_k", "fraction": 0.1}]) is None
    assert clipped_at([]) is None
    for norm in (0, -1, float("nan"), float("inf"), "1", True, None, 10**400):
        with pytest.raises(Refused):
            clipped_at([clip(norm)])


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@given(st.dictionaries(st.sampled_from(sorted(recipe())), JSON), JSON, JSON)
def test_a_hostile_recipe_is_refused_or_has_facts_and_no_more(tmp_path_factory, parts, algorithm, user):
    said = {"recipe": recipe(**parts), "algorithm": algorithm, "user": user, "fedllm": "0.1.0", "model_sha256": ONE}
    site = site_in(tmp_path_factory.getbasetemp(), users=("x",))
    with contextlib.suppress(Refused):
        assert all(found.rule and found.sentence.isprintable() for found in refusals(site, facts(said), CATALOG))


def test_a_part_that_the_recipe_leaves_out_is_refused_and_not_taken_for_a_default():
    for left_out in (
        "task",
        "trainable",
        "client",
        "select",
        "aggregate",
        "optimiser",
        "transforms",
        "rounds",
        "model",
    ):
        parts = {key: value for key, value in recipe().items() if key != left_out}
        with pytest.raises(Refused, match=f"'{left_out}'"):
            facts({"recipe": parts, "algorithm": [], "user": "", "fedllm": "", "model_sha256": ""})


FILE = """
name = "hospital_a"
threads = 2
[data]
train = "my.jsonl"
columns = { prompt = "frage" }
[models]
"smollm2-135m-instruct" = { path = "m" }
[policy]
trainables = ["lora"]
clip = 1
"""


def read(folder, text):
    (folder / "site.toml").write_text(text, encoding="utf-8")
    return read_site(folder / "site.toml", CATALOG)


def test_a_site_file_is_read_and_its_folders_start_from_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    site = read(tmp_path, FILE)
    assert (site.state, site.kit) == (str(tmp_path / "state"), str(tmp_path / "kit"))
    assert site.models["smollm2-135m-instruct"].path == str(tmp_path / "m")
    assert site.data.columns == {"prompt": "frage"} and site.policy.clip == 1.0
    assert governing(site) == ["clip", "models", "trainables"]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nam = 'a'", r"the key 'nam' is unknown; did you mean 'name'\?"),
        ("threads = 1", "'name' is missing; add it"),
        ("name = '../a'", "'name' is '../a'; string should match"),
        ("name = 'a'\n[policy]\ntrainable = []", r"'policy.trainable' is unknown; did you mean 'trainables'\?"),
        ("name = 'a'\n[policy]\ntrainables = ['lorra']", r"policy.trainables has 'lorra'; did you mean 'lora'\?"),
        ("name = 'a'\n[policy]\nrecipes = ['abc']", "'policy.recipes.0' is 'abc'; string should match"),
        ("name = 'a'\n[models]\nm = { sha = 'x' }", r"'models.m.sha' is unknown; did you mean 'sha256'\?"),
        ("name = 'a'\n[data]\ntrane = 'x'", r"'data.trane' is unknown; did you mean 'train'\?"),
        ("name = ", "is not TOML"),
    ],
)
def test_what_is_wrong_with_a_site_file_is_one_sentence(tmp_path, text, sentence):
    with pytest.raises(FedllmError, match=sentence) as problem:
        read(tmp_path, text)
    assert str(tmp_path / "site.toml") in str(problem.value)


def test_no_site_file_is_one_sentence(tmp_path):
    with pytest.raises(FedllmError, match="There is no site file"):
        read_site(tmp_path / "none.toml", CATALOG)
