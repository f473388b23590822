"""Rows come in from every kind of source, or one sentence says what to mend."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import FedllmError
from fedllm.silo.sources import _from_hub, hold_out, read_rows, require_columns

SHARED = Path(__file__).resolve().parents[3] / "shared"
ROWS = [{"prompt": "Où?", "response": "Là."}, {"prompt": 'say "hi",\nplease', "response": "hi"}]


def write(path: Path, rows: list[dict]) -> Path:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_csv(path: Path, rows: list[dict]) -> Path:
    import pandas

    pandas.DataFrame(rows).to_csv(path, index=False)
    return path


def write_parquet(path: Path, rows: list[dict]) -> Path:
    import pyarrow
    import pyarrow.parquet

    path.parent.mkdir(parents=True, exist_ok=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    return path


def error_of(source: Path | str, split: str = "train") -> str:
    with pytest.raises(FedllmError) as caught:
        read_rows(source, split)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.json.gz", "A.JSONL"])
def test_json_lines(tmp_path, name):
    assert read_rows(write(tmp_path / name, ROWS)) == ROWS


def test_a_json_file_may_hold_one_list(tmp_path):
    (tmp_path / "a.json").write_text(json.dumps(ROWS, indent=2))
    assert read_rows(tmp_path / "a.json") == ROWS


@pytest.mark.parametrize("name", ["a.csv", "a.csv.gz"])
def test_csv(tmp_path, name):
    assert read_rows(write_csv(tmp_path / name, ROWS)) == ROWS


def test_csv_takes_long_fields(tmp_path):
    rows = [{"text": "word " * 100_000}]
    assert read_rows(write_csv(tmp_path / "a.csv", rows)) == rows


def test_parquet(tmp_path):
    assert read_rows(write_parquet(tmp_path / "a.parquet", ROWS)) == ROWS


def test_text_is_one_row_and_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfone\ntwo\n")
    assert read_rows(str(tmp_path / "a.txt")) == [{"text": "one\ntwo\n"}]


def test_saved_datasets(tmp_path):
    import datasets

    dataset = datasets.Dataset.from_list(ROWS)
    dataset.save_to_disk(str(tmp_path / "one"))
    datasets.DatasetDict({"train": dataset, "test": dataset.select([0])}).save_to_disk(str(tmp_path / "two"))
    assert read_rows(tmp_path / "one") == read_rows(tmp_path / "two") == ROWS
    assert read_rows(tmp_path / "two", "test") == ROWS[:1]
    assert "no split 'tests'; did you mean 'test'?" in error_of(tmp_path / "two", "tests")
    (tmp_path / "one" / "state.json").write_text("{}")
    assert "not a whole saved dataset" in error_of(tmp_path / "one")


def test_a_folder_is_read_by_the_names_of_its_files(tmp_path):
    write(tmp_path / "nih.train.jsonl", ROWS)
    write_parquet(tmp_path / "data" / "test-00000-of-00001.parquet", ROWS[:1])
    (tmp_path / "LICENSE").write_text("free")
    assert read_rows(tmp_path) == ROWS
    assert read_rows(tmp_path, "test") == ROWS[:1]
    assert "no file named after the split 'validation'" in error_of(tmp_path, "validation")


def test_a_folder_without_split_names_is_all_train(tmp_path):
    write(tmp_path / "a.jsonl", ROWS[:1])
    write(tmp_path / "b.jsonl.gz", ROWS[1:])
    assert read_rows(tmp_path) == ROWS


def test_a_hub_dataset_loads_through_datasets(tmp_path):
    write_parquet(tmp_path / "repo" / "data" / "train-00000-of-00001.parquet", ROWS)
    assert _from_hub(str(tmp_path / "repo"), "train") == ROWS
    with pytest.raises(FedllmError, match="its split 'nope'"):
        _from_hub(str(tmp_path / "repo"), "nope")


def test_a_hub_id_that_cannot_be_had_says_both(monkeypatch):
    import datasets

    def fail(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the Hub\nlong tale")

    monkeypatch.setattr(datasets, "load_dataset", fail)
    message = error_of("org/name:config")
    assert "org/name:config is neither a file or folder here nor" in message
    assert "(Couldn't reach the Hub)" in message


@pytest.mark.parametrize(
    ("name", "data", "says"),
    [
        ("a.jsonl", b'{"a": 1}\n\n{"a": \n', "a.jsonl, line 3: broken JSON"),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl, line 2: not a JSON object"),
        ("a.jsonl", b'{"a": "x"}\n{"a": "\xff"}\n', "a.jsonl, line 2: not UTF-8"),
        ("a.jsonl", b" \n\n", "a.jsonl has no rows"),
        ("a.txt", b" \n\n", "a.txt has no rows"),
        ("a.txt", b"one\ntwo\n\xe9", "a.txt, line 3: not UTF-8"),
        ("a.json", b'[{"a": 1},\n {"a" 2}]', "a.json, line 2: broken JSON"),
        ("a.json", b'[{"a": 1}, 2]', "a.json, item 2: not a JSON object"),
        ("a.json", b"[]", "a.json has no rows"),
        ("a.jsonl.gz", b"plain", "a.jsonl.gz is not a whole gzip file"),
        ("a.jsonl.gz", gzip.compress(b'{"a": 1}\n' * 99)[:-9], "a.jsonl.gz is not a whole gzip file"),
        ("a.csv", b"a,b\n1,2\n1,2,3\n", "a.csv, line 3: 3 fields where the header has 2"),
        ("a.csv", b'a,b\n1,"2\n', "a.csv, line 2: broken CSV"),
        ("a.csv", b"a,a\n1,2\n", "a.csv, line 1: a column name is there twice"),
        ("a.csv", b"a,b\n", "a.csv has no rows"),
        ("a.parquet", b"PAR1 no", "a.parquet is not a whole Parquet file"),
        ("a.xlsx", b"PK", "known are .csv, .json, .jsonl, .parquet, .txt"),
        ("a.parquet.gz", b"PK", "a.parquet.gz has an unknown ending"),
    ],
)
def test_broken_files_are_named_with_line_and_remedy(tmp_path, name, data, says):
    (tmp_path / name).write_bytes(data)
    assert says in error_of(tmp_path / name)


def test_missing_things(tmp_path):
    assert "does not exist" in error_of(tmp_path / "a.jsonl")
    assert "does not exist" in error_of("data/a.jsonl")
    assert "holds no file" in error_of(tmp_path)


def test_require_columns():
    require_columns(ROWS, ["prompt", "response"], "a.jsonl")
    columns = "its columns: 'prompt', 'response'"
    says = f"a.jsonl, row 1, has no column 'respones' ({columns}); did you mean 'response'?"
    with pytest.raises(FedllmError) as caught:
        require_columns(ROWS, ["respones"], "a.jsonl")
    assert str(caught.value) == says
    with pytest.raises(FedllmError, match="row 3, has no column 'prompt'"):
        require_columns([*ROWS, {"response": "x"}], ["prompt"], "a.jsonl")


@settings(deadline=None)
@given(
    st.lists(st.integers(0, 9), min_size=2, max_size=60).filter(lambda values: len(set(values)) > 1),
    st.floats(0.01, 0.99),
    st.integers(0, 5),
    st.randoms(),
)
def test_hold_out_is_a_property_of_the_row(values, fraction, seed, random):
    rows = [{"text": str(value), "more": [value]} for value in values]
    train, test = hold_out(rows, fraction, seed)
    key = json.dumps
    assert train and test
    assert sorted(map(key, [*train, *test])) == sorted(map(key, rows))
    assert not {key(row) for row in train} & {key(row) for row in test}
    shuffled = [{"more": row["more"], "text": row["text"]} for row in random.sample(rows, len(rows))]
    _, again = hold_out(shuffled, fraction, seed)
    assert sorted(row["text"] for row in again) == sorted(row["text"] for row in test)


def test_hold_out_holds_about_the_fraction_and_refuses_what_cannot_be_split():
    rows = [{"text": str(number)} for number in range(2000)]
    assert 150 < len(hold_out(rows, 0.1)[1]) < 250
    assert hold_out(rows, 0.1) != hold_out(rows, 0.1, seed=1)
    for few in ([], [{"a": 1}], [{"a": 1}] * 5):
        with pytest.raises(FedllmError, match="give a test file"):
            hold_out(few, 0.5)
    with pytest.raises(FedllmError, match="above 0 and below 1"):
        hold_out(rows, 1.0)


def test_real_files():
    folder = SHARED / "data"
    if not folder.is_dir():
        pytest.skip("the shared data folder is not on this machine")
    assert len(read_rows(folder / "banking77")) == 10_003
    assert len(read_rows(folder / "banking77", "test")) == 3_080
    assert "prompt" in read_rows(folder / "medquad" / "cdc.train.jsonl.gz")[0]
    assert len(read_rows(folder / "safety" / "presidio_pii" / "synth_dataset_v2.json.gz")) == 1_500
    assert len(read_rows(folder / "safety" / "xstest" / "xstest_prompts.csv.gz")) == 450
