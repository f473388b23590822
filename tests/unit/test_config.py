"""A recipe: what is unknown is answered with the nearest known, what is set comes back as it was."""

from __future__ import annotations

import typing

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from fedllm.app.catalog import CATALOG, checked, make
from fedllm.app.config import KNOWN, Recipe, SiloFiles, read_recipe, read_toml, with_setting, write_recipe
from fedllm.core.errors import FedllmError


def problem(source, *settings):
    with pytest.raises(FedllmError) as caught:
        read_recipe(source, settings)
    text = str(caught.value)
    assert "\n" not in text
    return text


@pytest.mark.parametrize(
    ("table", "said"),
    [
        ({"ronds": 3}, "the key 'ronds' is unknown; did you mean 'rounds'?"),
        ({"evaluate": {"poold": True}}, "the key 'evaluate.poold' is unknown; did you mean 'pooled'?"),
        ({"scratch": {"dpeth": 3}}, "the key 'scratch.dpeth' is unknown; did you mean 'depth'?"),
        ({"links": {"overlp": True}}, "the key 'links.overlp' is unknown; did you mean 'overlap'?"),
        ({"federation": {"leest": 2}}, "the key 'federation.leest' is unknown; did you mean 'least'?"),
        ({"data": {"limit_trian": 5}}, "the key 'data.limit_trian' is unknown; did you mean 'limit_train'?"),
        ({"silos": {"a": {"train": "x", "tset": "y"}}}, "the key 'silos.a.tset' is unknown; did you mean 'test'?"),
        ({"silos": {"a": {"trian": "x"}}}, "the key 'silos.a.trian' is unknown; did you mean 'train'?"),
        ({"rounds": -1}, "'rounds' is -1; input should be greater than or equal to 0."),
        ({"rounds": "many"}, "'rounds' is 'many'; input should be a valid integer"),
        ({"runtime": "cloud"}, "'runtime' is 'cloud'; input should be 'auto', 'local' or 'cohort'"),
        ({"data": {"held_out": 1.5}}, "'data.held_out' is 1.5; input should be less than 1"),
        ({"silos": {"a": {"test": "x"}}}, "'silos.a.train' is missing; add it."),
        ({"silos": {"a": 5}}, "'silos.a'"),
        ({"silos": 5}, "'silos'"),
        ({"data": 5}, "'data'"),
        ({"client": 5}, "'client'"),
        ({"transforms": "clip"}, "'transforms'"),
        ({"partition": {"silos": 3}}, "[partition] has no 'name'; say which partition it is."),
        ({"zzzz": 1}, "the key 'zzzz' is unknown; known: aggregate, algorithm, availability, canaries, cleaning"),
    ],
)
def test_what_is_wrong_with_a_recipe_is_one_sentence(table, said):
    assert said in problem(table)


@pytest.mark.parametrize(
    ("kind", "part", "said"),
    [
        ("trainable", {"name": "lorra"}, "trainable.name 'lorra' is unknown; did you mean 'lora'?"),
        ("optimiser", {"name": "fedadm"}, "did you mean 'fedadam'?"),
        ("trainable", {"name": "lora", "rank": 4}, "trainable.rank is not a setting of 'lora'"),
        ("trainable", {"name": "lora", "dropuot": 0.1}, "did you mean 'dropout'?"),
        ("trainable", {"name": "lora", "r": "four"}, "trainable.r is 'four'; input should be a valid integer"),
        ("optimiser", {"name": "fedavg", "learning_rate": "fast"}, "optimiser.learning_rate is 'fast'"),
        ("transforms", {"name": "cast", "dtype": "int8"}, "transforms.dtype is 'int8'; input should be"),
        ("transforms", {"name": "clip"}, "transforms.max_norm is missing; 'clip' needs it."),
        ("transforms", {"max_norm": 1.0}, "transforms has no 'name'"),
        ("aggregate", {"name": "mean", "weights": "size"}, "aggregate.weights is 'size'"),
        ("transforms", {"name": "clip", "max_norm": 0}, "max_norm is 0"),
    ],
)
def test_what_is_wrong_with_a_part_is_one_sentence(kind, part, said):
    with pytest.raises(FedllmError) as caught:
        make(kind, part)
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_the_first_arguments_are_ours_to_give():
    with pytest.raises(FedllmError, match=r"task.tokenizer is not a setting of 'instruct'"):
        make("task", {"name": "instruct", "tokenizer": "x"}, object())
    with pytest.raises(FedllmError, match=r"client.objective is not a setting"):
        make("client", {"name": "local_training", "objective": "x"}, None, 0)


def test_a_part_is_made_with_its_settings_and_what_is_offered():
    select = make("select", {"name": "fixed_size", "size": 2}, ["a", "b", "c"], seed=3)
    assert [select(n) for n in range(5)] == [
        make("select", {"name": "fixed_size", "size": 2, "seed": 3}, ["a", "b", "c"])(n) for n in range(5)
    ]
    assert make("select", {"name": "everyone"}, ["a"], seed=3)(0) == ["a"]


def test_any_setting_of_a_method_of_peft_passes():
    assert make("trainable", {"name": "peft", "method": "LORA", "lora_alpha": 4, "r": 2}).name == "lora"
    with pytest.raises(FedllmError, match="did you mean 'lora_alpha'"):
        make("trainable", {"name": "peft", "method": "LORA", "lora_alpa": 4})


def test_every_part_of_the_catalogue_has_settings_that_can_be_checked():
    for kind, parts in CATALOG.items():
        for name, function in parts.items():
            with pytest.raises(FedllmError):
                make(kind, {"name": name + "x"})
            assert callable(function) and function.__doc__, name


@pytest.mark.parametrize(
    ("setting", "table"),
    [
        ("rounds=5", {"rounds": 5}),
        ("client.learning_rate=1e-3", {"client": {"learning_rate": 1e-3}}),
        ("client.steps = 5", {"client": {"steps": 5}}),
        ("evaluate.pooled=true", {"evaluate": {"pooled": True}}),
        ("model=HuggingFaceTB/SmolLM2-135M", {"model": "HuggingFaceTB/SmolLM2-135M"}),
        ("name='5'", {"name": "5"}),
        ('name="a = b"', {"name": "a = b"}),
        ("silos.a=a.jsonl", {"silos": {"a": "a.jsonl"}}),
        ("silos.a=/data/my silo/a=1.jsonl", {"silos": {"a": "/data/my silo/a=1.jsonl"}}),
        ("silos.a.test=t.jsonl", {"silos": {"a": {"test": "t.jsonl"}}}),
        ("trainable.target_modules=['q_proj', 'v_proj']", {"trainable": {"target_modules": ["q_proj", "v_proj"]}}),
        ("transforms=[{name='clip', max_norm=1.0}]", {"transforms": [{"name": "clip", "max_norm": 1.0}]}),
        ("name=", {"name": ""}),
    ],
)
def test_a_setting_is_toml_or_else_text(setting, table):
    assert with_setting({}, setting) == table


def test_a_setting_keeps_what_stands_beside_it():
    before = {"rounds": 3, "client": {"steps": 3, "batch_size": 4}}
    assert with_setting(before, "client.steps=5") == {"rounds": 3, "client": {"steps": 5, "batch_size": 4}}
    assert before["client"]["steps"] == 3


def test_a_setting_of_a_part_named_in_short_keeps_its_name():
    recipe = read_recipe({"trainable": "dora", "optimiser": "fedadam"}, ["trainable.r=4", "optimiser.tau=0.1"])
    assert recipe.trainable == {"name": "dora", "r": 4} and recipe.optimiser == {"name": "fedadam", "tau": 0.1}


def test_settings_that_cannot_be_made_say_why():
    assert "--set 'rounds' has no '='; write it as key.path=value." in problem({}, "rounds")
    assert "'rounds' is not a table" in problem({"rounds": 3}, "rounds.x=1")
    assert "did you mean 'rounds'?" in problem({}, "round=3")


def test_silos_are_given_in_short_or_at_length():
    short = read_recipe({"silos": {"a": "a.jsonl", "b": {"train": "b.csv", "test": "t.csv"}}})
    assert short.silos == {"a": SiloFiles(train="a.jsonl"), "b": SiloFiles(train="b.csv", test="t.csv")}
    assert read_recipe({}, ["silos.a=a.jsonl", "silos.b.train=b.csv", "silos.b.test=t.csv"]).silos == short.silos
    assert read_recipe(short.model_dump()) == short


def test_the_usual_part_needs_no_name():
    assert read_recipe({"client": {"steps": 3}}).client == {"name": "local_training", "steps": 3}
    assert read_recipe({"task": {"max_tokens": 9}}).task == {"name": "instruct", "max_tokens": 9}
    assert read_recipe({"trainable": {"r": 4}}).trainable == {"name": "lora", "r": 4}


VALUES = (
    st.integers(-(2**40), 2**40)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.booleans()
    | st.text(st.characters(exclude_categories=("Cs",)), max_size=10)
)
TEXTS = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=10)
TABLES = st.dictionaries(TEXTS, VALUES | st.lists(VALUES, max_size=3), max_size=3).map(lambda t: {**t, "name": "x"})


@settings(deadline=None, max_examples=100)
@given(
    st.fixed_dictionaries(
        {},
        optional={
            "name": TEXTS,
            "seed": st.integers(0, 2**60),
            "rounds": st.integers(0, 10),
            "threads": st.none() | st.integers(1, 4),
            "silos": st.dictionaries(TEXTS, TEXTS | st.fixed_dictionaries({"train": TEXTS, "test": TEXTS}), max_size=3),
            "data": st.fixed_dictionaries(
                {}, optional={"root": TEXTS, "held_out": st.floats(0.01, 0.99), "limit_test": st.integers(1, 9)}
            ),
            "evaluate": st.fixed_dictionaries(
                {}, optional={"pooled": st.booleans(), "choice": st.dictionaries(TEXTS, TEXTS, max_size=2)}
            ),
            "task": TABLES,
            "trainable": TABLES,
            "transforms": st.lists(TABLES, max_size=2),
            "partition": TABLES,
        },
    )
)
def test_a_recipe_that_is_written_reads_back_the_same(tmp_path_factory, table):
    recipe = read_recipe(table)
    path = tmp_path_factory.mktemp("recipe") / "recipe.toml"
    path.write_text(write_recipe(recipe), encoding="utf-8")
    assert read_recipe(path) == recipe
    assert read_recipe(read_toml(path)) == recipe


def test_a_limit_that_was_lifted_stays_lifted(tmp_path):
    recipe = read_recipe({"data": {"limit_test": 0}})
    (tmp_path / "recipe.toml").write_text(write_recipe(recipe))
    assert read_recipe(tmp_path / "recipe.toml") == recipe


def test_a_recipe_that_is_not_there_or_not_toml_is_named(tmp_path):
    assert "There is no recipe" in problem(tmp_path / "gone.toml")
    (tmp_path / "bad.toml").write_text("rounds = = 3")
    assert "bad.toml' is not TOML" in problem(tmp_path / "bad.toml")
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    assert "is not TOML" in problem(tmp_path / "latin.toml")
    assert "is not TOML" in problem(tmp_path)


def test_a_value_is_taken_as_the_type_that_is_asked_for():
    assert checked("x", 3, float) == 3.0 and isinstance(checked("x", 3, float), float)
    assert checked("x", ["a"], list[str] | str | None) == ["a"]
    with pytest.raises(FedllmError, match=r"^x is 'a'; "):
        checked("x", "a", int)


def test_every_closed_table_of_a_recipe_names_its_keys():
    tables = {"silos"}
    for name, field in Recipe.model_fields.items():
        kinds = [field.annotation, *typing.get_args(field.annotation)]
        tables |= {name for kind in kinds if isinstance(kind, type) and issubclass(kind, BaseModel)}
    assert tables | {""} == set(KNOWN)
