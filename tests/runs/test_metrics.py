"""metrics.jsonl, TensorBoard event files read back by TensorBoard itself, and the console."""

import json
from types import SimpleNamespace

import pytest
from tensorboard.backend.event_processing.data_provider import MultiplexerDataProvider
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.backend.event_processing.plugin_event_multiplexer import EventMultiplexer
from tensorboard.context import RequestContext
from tensorboard.plugins.hparams import api_pb2, list_session_groups
from tensorboard.plugins.hparams.backend_context import Context
from tensorboard.plugins.hparams.metadata import parse_session_start_info_plugin_data
from tensorboard.util import tensor_util

from oel_jax.errors import UserError
from oel_jax.runs.metrics import Metrics, duration, printable, read, table
from oel_jax.runs.workdir import Workdir


def without_time(path):
    return [{k: v for k, v in row.items() if k != "time"} for row in read(path)]


def test_rows_hold_means_and_keep_time_apart(tmp_path):
    w = Workdir(tmp_path)
    with Metrics(w, tensorboard=False) as metrics:
        values = {"loss": (3.0, 4), "empty": (0.0, 0), "norm": 2, "bad": float("nan")}
        metrics.scalars("consolidate", 3, values, round=1, time_values={"tokens/s": (100, 2)})
    (row,) = read(w.metrics_file)
    assert row["values"] == {"loss": 0.75, "norm": 2.0, "bad": "NaN"}
    assert (row["stage"], row["round"], row["step"]) == ("consolidate", 1, 3)
    assert row["time"]["tokens/s"] == 50 and row["time"]["at"] > 1.6e9
    assert not w.tensorboard.exists()


def test_tensorboard_reads_scalars_and_texts_back(tmp_path):
    w = Workdir(tmp_path)
    with Metrics(w) as metrics:
        for step in (1, 2, 3):
            metrics.scalars("consolidate", step, {"loss": 1 / step}, round=2)
        metrics.text("knowledge", 1, "- H loses\n- <b>G</b> wins", stage="extract", round=2)
        metrics.scalars("evaluate", 2, {"pass_rate": 0.5})
    events = EventAccumulator(str(w.tensorboard / "round_002" / "consolidate")).Reload()
    scalars = events.Scalars("consolidate/loss")
    assert [event.step for event in scalars] == [1, 2, 3]
    assert scalars[2].value == pytest.approx(1 / 3)
    events = EventAccumulator(str(w.tensorboard / "round_002" / "extract")).Reload()
    (event,) = events.Tensors("knowledge")
    assert event.tensor_proto.string_val[0] == b"    - H loses\n    - <b>G</b> wins"
    events = EventAccumulator(str(w.tensorboard / "run" / "evaluate")).Reload()
    assert events.Scalars("evaluate/pass_rate")[0].step == 2


def test_tensorboard_reads_histograms_and_settings_back(tmp_path):
    w = Workdir(tmp_path / "run")
    w.root.mkdir()
    lengths = [20, 26, 26, 26]
    for number in (1, 2):  # a resumed run writes into the same group
        with Metrics(w) as metrics:
            metrics.histogram("response_tokens", number, lengths, "evaluate_start")
            fields = {"loss.top_k": 16, "model.thinking": True, "evaluate.curve": [1, 5]}
            metrics.settings(fields, {"final/pass_rate": number / 4}, step=number)
    events = EventAccumulator(str(w.tensorboard / "run" / "evaluate_start")).Reload()
    buckets = tensor_util.make_ndarray(events.Tensors("response_tokens")[0].tensor_proto)
    assert buckets[:, 2].sum() == 4 and (buckets[0, 0], buckets[-1, 1]) == (20, 26)
    assert buckets[0, 2] == 1 and buckets[-1, 2] == 3
    events = EventAccumulator(str(w.tensorboard / "run" / "hparams")).Reload()
    finals = {event.step: event.value for event in events.Scalars("final/pass_rate")}
    assert finals == {1: 0.25, 2: 0.5}
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = parse_session_start_info_plugin_data(content)
    assert started.group_name == ""  # see the test of two runs whose directories share a name
    assert started.hparams["loss.top_k"].number_value == 16
    assert started.hparams["model.thinking"].bool_value is True
    assert started.hparams["evaluate.curve"].string_value == "[1, 5]"
    with Metrics(w, tensorboard=False) as metrics:
        metrics.settings({}, {}, step=1)
        metrics.histogram("x", 1, [1.0], "evaluate")
    assert not (w.tensorboard / "run" / "evaluate").exists()


def test_runs_whose_directories_share_a_name_keep_their_own_numbers(tmp_path):
    """As TensorBoard's own HPARAMS view reads them: it shows the mean of trials with one name."""
    wanted = {"low/seed_1": 0.0625, "high/seed_1": 0.09375, "high/seed_2": 0.5}
    for place, rate in wanted.items():
        w = Workdir(tmp_path / place)
        w.root.mkdir(parents=True)
        for _ in range(2):  # the second time as a resumed run: it joins its own trial
            with Metrics(w) as metrics:
                fields = {"rate": 0.1, "seed": 1}  # equal settings do not make equal trials
                metrics.settings(fields, {"final/pass_rate": rate}, step=1)
    files = EventMultiplexer().AddRunsFromDirectory(str(tmp_path)).Reload()
    provider = SimpleNamespace(data_provider=MultiplexerDataProvider(files, str(tmp_path)))
    request = api_pb2.ListSessionGroupsRequest(allowed_statuses=[0, 1, 2, 3], slice_size=100)
    answer = list_session_groups.Handler(RequestContext(), Context(provider), "", request).run()
    shown = {
        group.name.removesuffix("/tensorboard/run/hparams"): group.metric_values[0].value
        for group in answer.session_groups
    }
    assert shown == wanted
    assert all(len(group.sessions) == 1 for group in answer.session_groups)


def test_a_rewound_run_equals_an_uninterrupted_one(tmp_path):
    straight, broken = Workdir(tmp_path / "a"), Workdir(tmp_path / "b")
    for w in (straight, broken):
        w.root.mkdir()
    with Metrics(straight) as metrics:
        metrics.scalars("evaluate", 0, {"x": 9})
        for step in range(1, 6):
            metrics.scalars("consolidate", step, {"x": step}, round=1)
    with Metrics(broken) as metrics:
        metrics.scalars("evaluate", 0, {"x": 9})
        for step in range(1, 5):  # killed after step 4; the checkpoint is of step 2
            metrics.scalars("consolidate", step, {"x": -step if step > 2 else step}, round=1)
    with broken.metrics_file.open("ab") as file:
        file.write(b'{"stage": "consol')
    with Metrics(broken) as metrics:
        metrics.rewind("consolidate", 1, 2)
        for step in range(3, 6):
            metrics.scalars("consolidate", step, {"x": step}, round=1)
    assert without_time(broken.metrics_file) == without_time(straight.metrics_file)
    events = EventAccumulator(str(broken.tensorboard / "round_001" / "consolidate")).Reload()
    assert [event.value for event in events.Scalars("consolidate/x")] == [1, 2, 3, 4, 5]


def test_rewind_touches_only_its_stage_and_round(tmp_path):
    w = Workdir(tmp_path)
    with Metrics(w, tensorboard=False) as metrics:
        for stage, round_number in (("extract", 1), ("consolidate", 1), ("consolidate", 2)):
            for step in (1, 2):
                metrics.scalars(stage, step, {"x": 1}, round=round_number)
        metrics.rewind("consolidate", 2, 0)
        metrics.rewind("consolidate", 1, 1)
    left = [(row["stage"], row["round"], row["step"]) for row in read(w.metrics_file)]
    assert left == [("extract", 1, 1), ("extract", 1, 2), ("consolidate", 1, 1)]


def test_rows_are_on_disk_at_once_and_a_cut_last_line_goes(tmp_path):
    w = Workdir(tmp_path)
    metrics = Metrics(w, tensorboard=False)
    metrics.scalars("deploy", 1, {"x": 1})
    assert len(read(w.metrics_file)) == 1
    metrics.close()
    with w.metrics_file.open("ab") as file:
        file.write(b'{"stage"')
    Metrics(w, tensorboard=False).close()
    assert w.metrics_file.read_bytes().endswith(b"}\n")


def test_a_damaged_line_elsewhere_is_named(tmp_path):
    w = Workdir(tmp_path)
    w.metrics_file.write_text('{"stage": "a", "round": 0, "step": 1, "values": {}}\nrubbish\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl:2 is not a row"):
        Metrics(w, tensorboard=False)
    w.metrics_file.write_text(json.dumps([1]) + "\n")
    with pytest.raises(UserError, match=r"metrics\.jsonl:1"):
        read(w.metrics_file)


def test_duration_and_table():
    assert [duration(s) for s in (0, 7.4, 754, 3723, -1)] == [
        "0:00",
        "0:07",
        "12:34",
        "1:02:03",
        "0:00",
    ]
    shown = table([["start", "6.8 %"], ["round 1", "28.9 %"]], ["", "pass rate"])
    assert shown.splitlines() == [
        "         pass rate",
        "-------  ---------",
        "start        6.8 %",
        "round 1     28.9 %",
    ]


def test_outside_text_cannot_drive_the_terminal():
    assert printable("H loses \x1b[2J\x07\u202e √") == "H loses ?[2J?? √"
