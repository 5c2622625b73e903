import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tempering.core.records import pair_from_row, prompt_from_row
from tempering.data import formats
from tempering.data.files import BUNDLED, bundled, read_records, read_rows, scan_rows

PAIR = {"prompt": "How do I bake bread?", "chosen": "Mix, wait, bake.", "rejected": "No."}


def write(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines(*rows: dict) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def prompts(*texts: str) -> str:
    return lines(*({"prompt": text} for text in texts))


@pytest.mark.parametrize("name", BUNDLED)
def test_every_bundled_file_has_rows(name):
    assert len(list(read_rows(bundled(name)))) > 0


def test_an_unknown_bundled_name_lists_the_known_ones():
    with pytest.raises(ValueError, match="no bundled data called 'pear'; expected one of pairs, "):
        bundled("pear")


def test_the_same_rows_in_every_format(tmp_path):
    rows = [PAIR, {**PAIR, "prompt": 'ünïcode \u2028 and, "quotes"\nand lines'}]
    write(tmp_path / "a.jsonl", "".join(json.dumps(r, ensure_ascii=False) + "\n" for r in rows))
    write(tmp_path / "a.json", json.dumps(rows, indent=2))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    cells = [",".join('"' + v.replace('"', '""') + '"' for v in row.values()) for row in rows]
    write(tmp_path / "a.csv", "\r\n".join(["prompt,chosen,rejected", *cells]) + "\r\n")
    found = {p.suffix: [row for _, row in read_rows(p)] for p in tmp_path.iterdir()}
    assert len(found) == 4
    assert all(value == rows for value in found.values())


def test_bom_crlf_blank_lines_and_a_missing_last_newline_are_harmless(tmp_path):
    path = write(tmp_path / "p.jsonl", b'\xef\xbb\xbf{"prompt": "a"}\r\n\r\n   \n{"prompt": "b"}')
    assert list(read_rows(path)) == [("p.jsonl:1", {"prompt": "a"}), ("p.jsonl:4", {"prompt": "b"})]


def test_json_lines_in_a_json_file(tmp_path):
    path = write(tmp_path / "p.json", "\n" + prompts("a", "b"))
    assert [where for where, _ in read_rows(path)] == ["p.json:2", "p.json:3"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": "b', r"p\.jsonl line 2: not valid JSON: it is cut off \(column 12\)"),
        ('{"prompt": "a"}\n{"prompt": ', r"p\.jsonl line 2: not valid JSON: it is cut off"),
        ("{'prompt': 'a'}", r"p\.jsonl line 1: not valid JSON: Expecting property name"),
        ('"just text"', r"p\.jsonl line 1: expected a JSON object, got str"),
        ('[{"prompt": "a"}]', r"line 1: expected a JSON object, got list; a file .* must be called \.json"),
        ('{"prompt": "a", "x": NaN}', r"p\.jsonl line 1: NaN is not valid JSON; use null"),
        ('{"prompt": "a", "x": -Infinity}', r"p\.jsonl line 1: -Infinity is not valid JSON"),
        ('{"prompt": "a", "x": 1e999}', r"p\.jsonl line 1: 1e999 is not valid JSON"),
        ('{"prompt": "\\ud800"}', r"p\.jsonl line 1: holds half of a surrogate pair"),
        ("[" * 100_000, r"p\.jsonl line 1: not valid JSON: nested too deeply"),
        ('{"n": ' + "9" * 5000 + "}", r"p\.jsonl line 1: .*digits"),
        (
            b'{"prompt": "a"}\n{"prompt": "\xe9"}\n',
            r"p\.jsonl line 2: not UTF-8 \(byte 13\); save it as UTF-8",
        ),
        ('{"prompt": "a"}'.encode("utf-16"), r"p\.jsonl line 1: not UTF-8 .*looks like UTF-16"),
        ("", r"p\.jsonl: no rows in it; expected one JSON object per line"),
        ("\n \n", r"p\.jsonl: no rows in it"),
    ],
)
def test_unreadable_json_lines_say_where_and_why(tmp_path, content, message):
    path = write(tmp_path / "p.jsonl", content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(path))


def test_a_utf16_file_is_one_problem_not_one_per_line(tmp_path):
    path = write(tmp_path / "p.jsonl", prompts("a", "b", "c").encode("utf-16"))
    assert [row.problem for row in scan_rows(path)] == ["not UTF-8 (byte 1); it looks like UTF-16; save it as UTF-8"]


def test_a_huge_line_is_refused_and_the_next_one_read(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, "MAX_LINE_BYTES", 1 << 20)
    path = write(tmp_path / "p.jsonl", prompts("a", "b" * (3 << 20), "c"))
    with pytest.raises(ValueError, match=r"p\.jsonl line 2: longer than 1 MiB; expected one record per line"):
        list(read_rows(path))
    parsed = read_records(path, prompt_from_row, invalid="drop")
    assert [p.text for p in parsed.records] == ["a", "c"]
    assert parsed.dropped == {"longer than 1 MiB; expected one record per line": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            '[{"prompt": "a"},\n {"prompt": "b"',
            r"p\.json: not valid JSON: it is cut off \(line 2 column 16\)",
        ),
        ("[]", r"p\.json: no rows in it"),
        ('[{"prompt": "a"}, 3]', r"p\.json row 2: expected a JSON object, got int"),
        (b'[{"prompt": "\xe9"}]', r"p\.json: not UTF-8"),
    ],
)
def test_unreadable_json_lists_say_where_and_why(tmp_path, content, message):
    path = write(tmp_path / "p.json", content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(path))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("prompt,chosen\na\n", r"p\.csv line 2: 1 cells, but the header has 2"),
        ("prompt,prompt\na,b\n", r"p\.csv line 1: a column name occurs twice"),
        ('prompt\n"a\nb\n', r"p\.csv line 2: not valid CSV \(unexpected end of data\)"),
        (b"prompt\n\xe9\n", r"p\.csv line 2: not UTF-8"),
        ("prompt\n", r"p\.csv: no rows in it"),
        ("", r"p\.csv: no rows in it"),
    ],
)
def test_unreadable_csv_says_where_and_why(tmp_path, content, message):
    path = write(tmp_path / "p.csv", content)
    with pytest.raises(ValueError, match=message):
        list(read_rows(path))


def test_csv_cells_may_hold_turns_lists_and_booleans(tmp_path):
    turns = json.dumps([{"role": "user", "content": "hi"}]).replace('"', '""')
    content = f'prompt,choices,label,id\n"{turns}","[""x"", ""y""]",True,\n[not a list],,harmful,007\n'
    first, second = (row for _, row in read_rows(write(tmp_path / "p.csv", content)))
    assert first == {
        "prompt": [{"role": "user", "content": "hi"}],
        "choices": ["x", "y"],
        "label": True,
        "id": None,
    }
    assert second == {"prompt": "[not a list]", "choices": None, "label": "harmful", "id": "007"}


def test_csv_line_numbers_count_lines_inside_cells(tmp_path):
    path = write(tmp_path / "p.csv", 'prompt\n"a\nb"\nc\n')
    assert [where for where, _ in read_rows(path)] == ["p.csv:2", "p.csv:4"]


def test_parquet_reads_turns_and_takes_nan_for_missing(tmp_path):
    rows = [{"prompt": [{"role": "user", "content": "hi"}], "note": float("nan")}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "p.parquet")
    assert list(read_rows(tmp_path / "p.parquet")) == [
        ("p.parquet:1", {"prompt": [{"role": "user", "content": "hi"}], "note": None})
    ]


def test_a_broken_parquet_file_is_named(tmp_path):
    path = write(tmp_path / "p.parquet", b"PAR1 but not really")
    with pytest.raises(ValueError, match=r"p\.parquet: not a readable Parquet file"):
        list(read_rows(path))


def test_a_folder_is_read_in_the_order_of_its_names_without_metadata(tmp_path):
    write(tmp_path / "b.jsonl", prompts("b"))
    write(tmp_path / "a/deep.jsonl", prompts("a"))
    write(tmp_path / ".cache/x.jsonl", prompts("hidden"))
    write(tmp_path / "dataset_info.json", '{"description": "no row"}')
    write(tmp_path / "README.md", "about")
    assert [where for where, _ in read_rows(tmp_path)] == ["a/deep.jsonl:1", "b.jsonl:1"]


def test_a_folder_with_several_splits_needs_a_choice(tmp_path):
    write(tmp_path / "data/train-00000-of-00001.jsonl", prompts("a"))
    write(tmp_path / "data/test-00000-of-00001.jsonl", prompts("b"))
    with pytest.raises(ValueError, match=r"holds the splits test, train; choose one, as in .*:train"):
        list(read_rows(tmp_path))
    assert [row["prompt"] for _, row in read_rows(f"{tmp_path}:test")] == ["b"]
    with pytest.raises(ValueError, match="no data file of split 'dev' in this folder"):
        list(read_rows(f"{tmp_path}:dev"))


def test_folders_without_data_or_of_two_kinds_are_refused(tmp_path):
    write(tmp_path / "empty/notes.txt", "nothing")
    with pytest.raises(ValueError, match=r"empty: no data file in this folder; expected one of \.jsonl"):
        list(read_rows(tmp_path / "empty"))
    write(tmp_path / "two/a.jsonl", prompts("a"))
    write(tmp_path / "two/a.csv", "prompt\na\n")
    with pytest.raises(ValueError, match=r"two: holds \.csv and \.jsonl files; name one file"):
        list(read_rows(tmp_path / "two"))


@pytest.mark.parametrize("name", ["no/such/file.jsonl", "pairs", "./data/pairs", "a b/c"])
def test_a_missing_file_is_named(name):
    with pytest.raises(FileNotFoundError, match=r"no such file or folder; give a path to \.jsonl"):
        list(read_rows(name))


def test_a_slip_inside_an_existing_folder_does_not_ask_the_hub(tmp_path, monkeypatch):
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="data/pear: no such file or folder"):
        list(read_rows("data/pear"))


def test_an_unknown_suffix_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"p\.txt: unknown kind of file '\.txt'; expected one of"):
        list(read_rows(write(tmp_path / "p.txt", "a")))


def test_a_hub_id_is_loaded_with_revision_config_and_split(monkeypatch):
    asked = []

    def load_dataset(name, config, *, split, revision):
        asked.append((name, config, split, revision))
        rows = [{"prompt": "a", "note": float("nan")}]
        return rows if split else {"train": rows, "test": rows}

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    assert list(read_rows("org/name@v1.0:en:train")) == [("org/name@v1.0:en:train:1", {"prompt": "a", "note": None})]
    assert asked == [("org/name", "en", "train", "v1.0")]
    with pytest.raises(ValueError, match="choose one of its splits train, test, as in org/name:train"):
        list(read_rows("org/name"))


def test_a_hub_id_without_a_network_says_what_was_tried(monkeypatch):
    def load_dataset(*args, **kwargs):
        raise ConnectionError("cannot reach the Hub\nand much more")

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    with pytest.raises(
        ValueError,
        match=r"org/name:train: no such file or folder here, and Hub dataset 'org/name' could not be loaded "
        r"\(ConnectionError: cannot reach the Hub\); .* without a network give the path",
    ):
        list(read_rows("org/name:train"))


def test_the_first_bad_row_stops_with_its_line_and_the_remedy(tmp_path):
    path = write(tmp_path / "pairs.jsonl", lines(PAIR, {**PAIR, "rejected": PAIR["chosen"]}))
    with pytest.raises(ValueError) as caught:
        read_records(path, pair_from_row)
    assert str(caught.value) == (
        "pairs.jsonl line 2: 'chosen' equals 'rejected'; fix the row or set data.invalid=drop"
    )


def test_repeated_content_and_repeated_ids_are_found(tmp_path):
    again = write(tmp_path / "a.jsonl", lines(PAIR, {"id": "x", **PAIR}))
    with pytest.raises(ValueError, match=r"a\.jsonl line 2: has the same content as a\.jsonl line 1; fix"):
        read_records(again, pair_from_row)
    same_id = write(tmp_path / "b.jsonl", lines({"id": 1, **PAIR}, {"id": 1, **PAIR, "rejected": "Never."}))
    with pytest.raises(ValueError, match=r"b\.jsonl line 2: has the same id '1' as b\.jsonl line 1"):
        read_records(same_id, pair_from_row)


def test_dropping_counts_by_reason_and_keeps_the_rest(tmp_path):
    bad = {**PAIR, "rejected": PAIR["chosen"]}
    path = write(tmp_path / "p.jsonl", lines(PAIR, bad, bad, PAIR, {**PAIR, "prompt": "b"}) + '{"cut')
    parsed = read_records(path, pair_from_row, invalid="drop")
    assert [p.text for p in parsed.records] == [PAIR["prompt"], "b"]
    assert parsed.dropped == {
        "'chosen' equals 'rejected'": 2,
        "repeats an earlier row": 1,
        "not valid JSON: it is cut off (column 2)": 1,
    }


def test_nothing_usable_is_an_error_even_when_dropping(tmp_path):
    path = write(tmp_path / "p.jsonl", '{"cut')
    with pytest.raises(ValueError, match=r"no usable prompt \(1 x not valid JSON"):
        read_records(path, prompt_from_row, invalid="drop", what="prompt")


def test_limit_reads_no_further_than_it_must(tmp_path):
    path = write(tmp_path / "p.jsonl", prompts("a", "b") + "not json")
    assert [p.text for p in read_records(path, prompt_from_row, limit=2).records] == ["a", "b"]


def test_repeats_may_be_dropped_while_an_id_for_two_contents_is_an_error(tmp_path):
    path = write(tmp_path / "p.jsonl", lines({"prompt": "a"}, {"prompt": "a"}, {"prompt": "b", "id": 7}))
    parsed = read_records(path, prompt_from_row, repeats="drop", what="prompt")
    assert [p.text for p in parsed.records] == ["a", "b"]
    assert parsed.dropped == {"repeats an earlier prompt": 1}
    path = write(tmp_path / "p.jsonl", lines({"prompt": "a", "id": 7}, {"prompt": "b", "id": 7}))
    with pytest.raises(ValueError, match="line 2: has the same id '7'"):
        read_records(path, prompt_from_row, repeats="drop")
