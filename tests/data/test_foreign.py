"""Formats of other tools: what each says is wrong becomes spans of the right characters, and what is no such file is
told by file, row and remedy. The samples are made up in the shape of each tool's own output."""

import json

import pytest

from selsft import SelectiveSFTConfig, load_marked
from selsft.cli.arguments import CommandParser
from selsft.data.foreign import FORMATS, merged, split_format, with_format
from selsft.data.judged import judged_rows
from selsft.data.loading import DataSource, load_rows
from selsft.errors import InputError
from selsft.pipeline.recipe import load_recipe
from selsft.workflow.stage import data_source
from tests.support import tiny
from tests.support.trainers import make

M2 = """S The cats is sleeping at sofa .
A 2 3|||R:VERB:SVA|||are|||REQUIRED|||-NONE-|||0
A 5 5|||M:DET|||the|||REQUIRED|||-NONE-|||0

S They went home .
A -1 -1|||noop|||-NONE-|||REQUIRED|||-NONE-|||0

S I has two  dog ß .
A 1 2|||R:VERB|||have|||REQUIRED|||-NONE-|||0
A 3 4|||R:NOUN|||dogs|||REQUIRED|||-NONE-|||0
A 1 2|||R:VERB|||had|||REQUIRED|||-NONE-|||1
"""
MQM_HEAD = "system\tdoc\tdoc_id\tseg_id\trater\tsource\ttarget\tcategory\tseverity\n"
MQM = MQM_HEAD + (
    "A\tnews.1\t1\t7\trater1\tHe left.\tEr <v>blieb</v>.\tAccuracy/Mistranslation\tMajor\n"
    "A\tnews.1\t1\t7\trater2\tHe left.\tEr <v>blieb</v>.\tAccuracy/Mistranslation\tMinor\n"
    "A\tnews.1\t1\t7\trater2\tHe left.\t<v>Er</v> blieb.\tStyle/Awkward\tNeutral\n"
    "B\tnews.1\t1\t7\trater1\tHe left.\tEr ging.\tno-error\tno-error\n"
    'B\tnews.1\t2\t8\trater1\t"Say ""so"" now."\t"Sag ""<v>so</v>"" jetzt."\tFluency/Grammar\tmajor\n'
    "B\tnews.1\t3\t9\trater1\t<v>Not</v> now.\tJetzt.\tAccuracy/Omission\tMajor\n"
    "B\tnews.1\t4\t10\trater1\tYes.\tNein, aber ja.\tNon-translation!\tMajor\n"
    "B\tnews.1\t5\t11\trater1\tYes.\tJo.\tStyle/Awkward\tMinor\n"
    "B\tnews.1\t5\t11\trater1\tYes.\tJo.\tFound\tHOTW-test\n"
)
TASKS = [
    {
        "id": 12, "data": {"prompt": "Capital of France?", "completion": " It is 𝟏 Lyon.", "source": "quiz"},
        "annotations": [
            {"id": 1, "was_cancelled": False, "result": [
                {"id": "r1", "from_name": "label", "to_name": "text", "type": "labels",
                 "value": {"start": 9, "end": 13, "text": "Lyon", "labels": ["Wrong"]}},
                {"id": "r2", "from_name": "label", "to_name": "text", "type": "labels",
                 "value": {"start": 1, "end": 3, "text": "It", "labels": ["Unsure"]}},
                {"id": "c1", "from_name": "quality", "to_name": "text", "type": "choices", "value": {"choices": []}},
            ]},
            {"id": 2, "was_cancelled": True, "result": []},
        ],
    },
    {"id": 13, "data": {"prompt": "Say hi.", "completion": "Hi."}, "annotations": [{"id": 3, "result": []}]},
    {"id": 14, "data": {"prompt": "Say ho.", "completion": "Ho."}, "annotations": []},
]  # fmt: skip
LETTUCE = [
    {"prompt": "Capital of France?", "answer": "It is Lyon.", "split": "train", "task_type": "qa", "dataset": "made",
     "language": "en", "labels": [{"start": 6, "end": 10, "label": "Evident Conflict"}]},
    {"context": ["France is in Europe.", "Its capital is Paris."], "question": "Capital?", "answer": "It is Lyon.",
     "predictions": [{"start": 6, "end": 10, "text": "Lyon", "confidence": 0.97}]},
]  # fmt: skip
FACTORY = [
    {"messages": [
        {"role": "system", "content": [{"type": "text", "value": "Be brief."}], "loss_weight": 0.0},
        {"role": "user", "content": [{"type": "text", "value": "alpha?"}]},
        {"role": "assistant", "content": [{"type": "reasoning", "value": "beta"}, {"type": "text", "value": "gamma"}],
         "loss_weight": 0.5},
        {"role": "user", "content": [{"type": "text", "value": "delta?"}]},
        {"role": "assistant", "content": [{"type": "text", "value": "eta"}]},
    ], "extra": "kept"},
]  # fmt: skip
SWIFT = [
    {"messages": [
        {"role": "user", "content": "alpha?"},
        {"role": "assistant", "content": "beta ", "loss_scale": 1.0},
        {"role": "assistant", "content": "gamma", "loss_scale": 2.0},
        {"role": "user", "content": "delta?"},
        {"role": "assistant", "content": "eta", "loss": False},
    ]},
]  # fmt: skip
SAMPLES = {
    "m2": ("errors.m2", M2),
    "mqm": ("ratings.tsv", MQM),
    "label_studio": ("export.json", json.dumps(TASKS)),
    "lettucedetect": ("answers.jsonl", "\n".join(map(json.dumps, LETTUCE))),
    "llamafactory": ("chats.jsonl", "\n".join(map(json.dumps, FACTORY))),
    "ms_swift": ("chats.jsonl", "\n".join(map(json.dumps, SWIFT))),
}


def write(folder, form, content=None):
    name, sample = SAMPLES[form]
    (folder / name).write_text(sample if content is None else content, encoding="utf-8")
    return str(folder / name)


def said(rows, column="completion"):
    """For each row, the marked pieces of text with their weights."""
    return [
        None if row["spans"] is None else [(row[column][int(a) : int(b)], weight) for a, b, weight in row["spans"]]
        for row in rows
    ]


def test_m2(tmp_path):
    rows = load_marked(write(tmp_path, "m2"))
    assert rows["text"] == ["The cats is sleeping at sofa .", "They went home .", "I has two  dog ß ."]
    assert rows["line"] == [1, 5, 8]
    # One annotator: the changed word is wrong, the word after a missing one unknown; two: only what both change
    assert said(rows, "text") == [[("is", -1), ("sofa", 0)], [], [("has", -1), ("dog", 0)]]


def test_a_line_ends_at_its_line_break_alone(tmp_path):
    """Texts of the web hold U+2028, U+0085 and form feeds, where `str.splitlines` would cut them."""
    text = "one\u2028two\x85three\x0cfour"
    (tmp_path / "a.m2").write_bytes(f"S {text}\r\nA 0 1|||R:NOUN|||1|||REQUIRED|||-NONE-|||0\r\n\r\n".encode())
    (row,) = load_marked(tmp_path / "a.m2")
    assert row["text"] == text and row["spans"] == [[0.0, 3.0, -1.0]]
    line = f"A\tnews\t1\t7\tr1\tHi.\t{text}<v>!</v>\tStyle\tMajor\n"
    (tmp_path / "a.tsv").write_bytes((MQM_HEAD + line).encode())
    (row,) = load_marked(tmp_path / "a.tsv")
    assert row["completion"] == text + "!" and row["spans"] == [[float(len(text)), float(len(text)) + 1, -1.0]]


def test_mqm(tmp_path):
    rows = load_marked(write(tmp_path, "mqm"))
    assert rows["completion"] == ["Er blieb.", "Er ging.", 'Sag "so" jetzt.', "Jetzt.", "Nein, aber ja.", "Jo."]
    assert rows["prompt"][2] == 'Say "so" now.\n' and rows["prompt"][3] == "Not now.\n"
    assert said(rows) == [
        [("Er", 0), ("blieb", -1)], [], [("so", -1)], [], [("Nein, aber ja.", -1)], [("Jo.", 0)],
    ]  # fmt: skip
    assert rows["seg_id"] == ["7", "7", "8", "9", "10", "11"] and rows["line"] == [2, 5, 6, 7, 8, 9]
    assert rows["raters"] == [2, 1, 1, 1, 1, 1]


def test_mqm_without_a_header_and_with_the_names_of_the_viewer(tmp_path):
    bare = MQM.partition("\n")[2]
    viewer = MQM.replace("doc_id", "docSegId").replace("seg_id", "globalSegId")
    expected = load_marked(write(tmp_path, "mqm")).remove_columns("line").to_list()
    for content in (bare, viewer):
        assert load_marked(write(tmp_path, "mqm", content)).remove_columns("line").to_list() == expected


def test_label_studio(tmp_path):
    rows = load_marked(write(tmp_path, "label_studio"), "label_studio")
    assert said(rows) == [[("It", 0), ("Lyon", -1)], [], None]  # nobody has judged the last one
    assert rows["id"] == [12, 13, 14] and rows["source"][0] == "quiz" and rows["row"] == [0, 1, 2]


def test_label_studio_json_min(tmp_path):
    region = {"start": 6, "end": 10, "text": "Lyon", "labels": ["Error"]}
    task = {"id": 1, "text": "It is Lyon.", "label": [region], "annotator": 1, "annotation_id": 5}
    clean = {"id": 2, "text": "It is Paris.", "annotator": 1, "annotation_id": 6}
    rows = load_marked(write(tmp_path, "label_studio", json.dumps([task, clean])), "label_studio")
    assert said(rows, "text") == [[("Lyon", -1)], []]


def test_lettucedetect(tmp_path):
    rows = load_marked(write(tmp_path, "lettucedetect"), "lettucedetect")
    assert said(rows) == [[("Lyon", -1)], [("Lyon", -1)]]
    assert rows["prompt"] == ["Capital of France?\n", "France is in Europe.\nIts capital is Paris.\nCapital?\n"]
    assert rows["task_type"] == ["qa", None] and "labels" not in rows.column_names


def test_loss_weights_of_llamafactory(tmp_path):
    (row,) = load_marked(write(tmp_path, "llamafactory"), "llamafactory")
    assert [message["weight"] for message in row["messages"]] == [0, 0, 0.5, 0, 1]
    assert row["messages"][2]["content"] == "gamma" and row["messages"][2]["reasoning_content"] == "beta"
    assert row["extra"] == "kept"


def test_loss_scale_of_ms_swift(tmp_path):
    (row,) = load_marked(write(tmp_path, "ms_swift"), "ms_swift")
    assert [message["role"] for message in row["messages"]] == ["user", "assistant", "user", "assistant"]
    assert [message["weight"] for message in row["messages"]] == [0, 2, 0, 0]
    assert row["messages"][1]["content"] == "beta gamma" and row["messages"][1]["spans"] == [[0, 5, 1], [5, 10, 2]]


@pytest.mark.parametrize("form", FORMATS)
def test_reaches_the_tokens(tmp_path, options, form):
    """Rows of every format are trained on as they come, and the marked characters are in the weighted tokens."""
    rows = load_rows(DataSource(f"{form}:{write(tmp_path, form)}"))
    trainer = make(options, rows, max_length=200, max_steps=1)
    weights = [weight for row in trainer.train_dataset for weight in row["token_weights"]]
    assert (min(weights) == -1) == (form not in ("llamafactory", "ms_swift")) and max(weights) >= 1
    trainer.train()


def test_as_a_judged_sample(tmp_path, options):
    rows = load_rows(DataSource(write(tmp_path, "m2")))
    sample = judged_rows(rows, tiny.tokenizer(), SelectiveSFTConfig(**options))
    tokenizer = tiny.tokenizer()
    wrong = [tokenizer.decode(sample.input_ids[sample.span == span]).strip() for span in range(2)]
    assert wrong == ["is", "has"]


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("m2", "S a b\nA 0 x|||T|||c|||REQUIRED|||-NONE-|||0\n", r"as m2, line 2: 'A 0 x.* is no edit: it needs"),
        ("m2", "S a b\nA 1 3|||T|||c|||REQUIRED|||-NONE-|||0\n", "line 2: words 1 to 3 are outside of the sentence"),
        ("m2", "S a b\nS c\n", "line 2 begins a sentence, line 1 too: put an empty line"),
        ("m2", '{"text": "a"}\n', "line 1: .* is neither a sentence"),
        ("mqm", "a\tb\n", "ratings.tsv' as mqm, line 1 has 2 columns: it needs system, doc"),
        ("mqm", MQM_HEAD.replace("target", "text"), "line 1: the header has no 'target'"),
        ("mqm", MQM_HEAD + "A\td\t1\t1\tr\ts\t<v>t\tStyle\tMajor\n", "line 2: '<v>t' has a <v> that is not closed"),
        ("mqm", MQM_HEAD, "has no rows: check that this is its format"),
        ("label_studio", '[{"text": "a"}]', "row 0 has no 'annotations': export the project"),
        (
            "label_studio",
            json.dumps([{**TASKS[0], "data": {"prompt": "", "completion": "Something else altogether"}}]),
            "row 0: characters 9 to 13 are .* the mark says 'Lyon': it was made on another text",
        ),
        ("label_studio", '[{"data": {"t": "a"}, "annotations": []}]', "row 0 has the fields 't': it needs 'text', or"),
        ("lettucedetect", '{"answer": "a"}\n', "row 0 needs 'answer', a text, and 'labels'"),
        ("lettucedetect", '{"answer": "a", "spans": [{"start": 0, "end": 2}]}', "row 0: .* is outside of the answer"),
        ("lettucedetect", '{"answer": "a", "predictions": [{"token": "a", "prob": 0.1}]}', "output_format='spans'"),
        ("lettucedetect", '{"answer": "a"', "line 1 is not JSON"),
        ("llamafactory", '{"text": "a"}', "row 0 has no 'messages': this format is for conversations"),
        ("llamafactory", json.dumps({"messages": [{"role": "user", "content": [{"type": "image", "value": "x"}]}]}),
         "message 0: part .* is neither text nor reasoning"),
        ("ms_swift", json.dumps({"messages": [{"role": "user", "content": "a", "loss_scale": "2"}]}),
         "row 0: message 0: loss_scale='2' must be a finite number"),
        ("ms_swift", json.dumps({"messages": [{"content": "a"}]}), "message 0 has no 'role'"),
    ],
)  # fmt: skip
def test_refused(tmp_path, form, content, message):
    with pytest.raises(InputError, match=message):
        load_marked(write(tmp_path, form, content), form)
    with pytest.raises(InputError, match=message):  # the same from every command
        load_rows(DataSource(f"{form}:{tmp_path / SAMPLES[form][0]}"))


def test_names(tmp_path):
    assert split_format("a.m2") == ("m2", "a.m2") and split_format("mqm:a.m2") == ("mqm", "a.m2")
    assert split_format("org/name") == (None, "org/name") and with_format(None, "mqm") is None
    with pytest.raises(InputError, match="format='xml' is unknown: use one of m2, mqm"):
        with_format("a", "xml")
    with pytest.raises(InputError, match="give format, one of m2"):
        load_marked("a.jsonl")
    with pytest.raises(InputError, match=r"'no\.m2': no such file"):
        load_marked("no.m2")
    with pytest.raises(InputError, match=r"dataset_name='no\.m2': no such file"):
        load_rows(DataSource("no.m2"))
    with pytest.raises(InputError, match="dataset_streaming=True is not possible with a file of the format m2"):
        load_rows(DataSource(write(tmp_path, "m2"), streaming=True))
    path = tmp_path / "latin.m2"
    path.write_bytes("S é\n".encode("latin-1"))
    with pytest.raises(InputError, match="is not UTF-8"):
        load_marked(path)
    with pytest.raises(InputError, match="line 1 is not UTF-8"):
        load_rows(DataSource(str(path)))


def test_flag_and_recipe_key(tmp_path, monkeypatch):
    path = write(tmp_path, "label_studio")
    parse = CommandParser("train", "", "").parse
    arguments = parse(
        ["--model_name_or_path", "m", "--dataset_name", path, "--format", "label_studio", "--bf16", "false"]
    )
    assert arguments.source.name == f"label_studio:{path}" and arguments.source.description == path
    assert len(load_rows(arguments.source)) == 3
    (tmp_path / "recipe.yaml").write_text(f"model_name_or_path: m\ndataset_name: {path}\nformat: label_studio\n")
    recipe = load_recipe(str(tmp_path / "recipe.yaml"), [])
    assert recipe.get("dataset_name") == f"label_studio:{path}"
    before = data_source(recipe.get("dataset_name"))
    write(tmp_path, "label_studio", json.dumps(TASKS[:2]))
    assert data_source(recipe.get("dataset_name")) != before  # a changed file is a changed stage


@pytest.mark.parametrize(("form", "rows"), [("llamafactory", FACTORY), ("ms_swift", SWIFT)])
def test_loss_weights_are_not_lost(tmp_path, form, rows):
    path = tmp_path / "plain.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=f"read it with --format {form}, or drop the key"):
        load_rows(DataSource(str(path)))


def test_three_quarters():
    marks = [(0, 2, True)]
    assert merged("abcd", [marks] * 3 + [[]]) == [[0, 2, -1]]
    assert merged("abcd", [marks] * 2 + [[]]) == [[0, 2, 0]]
    assert merged("abcd", [[*marks, (0, 2, True)], []]) == [[0, 2, 0]]  # one judge counts once
    assert merged("abcd", [[(0, 2, True), (1, 3, False)]]) == [[0, 2, -1], [2, 3, 0]]
    assert merged("", [[]]) == []
