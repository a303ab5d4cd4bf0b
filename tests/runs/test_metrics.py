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

from oel_jax.base.errors import UserError
from oel_jax.runs.metrics import Metrics, duration, printable, read_metrics, table
from oel_jax.runs.tensorboard import Axis
from oel_jax.runs.workdir import Workdir


def without_time(path):
    return [{k: v for k, v in row.items() if k != "time"} for row in read_metrics(path)]


def test_rows_hold_means_and_keep_time_apart(tmp_path):
    w = Workdir(tmp_path)
    with Metrics(w, tensorboard=False) as metrics:
        values = {"loss": (3.0, 4), "empty": (0.0, 0), "norm": 2, "bad": float("nan")}
        metrics.scalars("consolidate", 3, values, round=1, time_values={"tokens/s": (100, 2)})
    (row,) = read_metrics(w.metrics_file)
    assert row["values"] == {"loss": 0.75, "norm": 2.0, "bad": "NaN"}
    assert (row["stage"], row["round"], row["step"]) == ("consolidate", 1, 3)
    assert row["time"]["tokens/s"] == 50 and row["time"]["at"] > 1.6e9
    assert not w.tensorboard.exists()


AXIS = Axis({"consolidate": 3, "evaluate_consolidated": 3, "extract": 2, "evaluate_skills": 3})


def shown(workdir):
    """The one run of a workdir, as TensorBoard reads it."""
    files = EventMultiplexer().AddRunsFromDirectory(str(workdir.root)).Reload()
    assert list(files.Runs()) == ["tensorboard"]
    return EventAccumulator(str(workdir.tensorboard), size_guidance={"scalars": 0}).Reload()


def curve(workdir, tag):
    return [(event.step, event.value) for event in shown(workdir).Scalars(tag)]


def test_tensorboard_shows_one_run_with_steps_that_are_global_over_rounds(tmp_path):
    w = Workdir(tmp_path)
    with Metrics(w, axis=AXIS) as metrics:
        metrics.scalars("evaluate_start", 0, {"pass_rate": 0.25})
        for number in (1, 2):
            for step in (1, 2):
                metrics.scalars("extract", step, {"tokens": 4}, round=number)
            for step in (1, 2, 3):
                values = {"loss": 4.0**-step, "bad": float("inf")}
                metrics.scalars("consolidate", step, values, number, time_values={"tokens/s": 9})
                metrics.histogram("response_tokens", step, [1, 2], "consolidate", number)
            metrics.scalars("evaluate_consolidated", 3, {"pass_rate": 0.25 + number / 4}, number)
            metrics.scalars("preflight", number, {"gain": 0.5}, round=number)
            metrics.scalars("time_deploy", number, {}, number, time_values={"deploy_seconds": 2})
            metrics.text("knowledge", 2, "- H loses\n- <b>G</b> wins", "extract", number)
            metrics.text("game", number, "won", "evaluate_consolidated", number)
    steps = [(step, 4.0 ** -(1 + (step - 1) % 3)) for step in range(1, 7)]
    assert curve(w, "consolidate/loss") == steps
    assert [value for _, value in curve(w, "consolidate/bad")] == [float("inf")] * 6
    assert curve(w, "evaluate/pass_rate") == [(0, 0.25), (3, 0.5), (6, 0.75)]
    assert [step for step, _ in curve(w, "extract/tokens")] == [1, 2, 3, 4]
    assert curve(w, "preflight/gain") == [(1, 0.5), (2, 0.5)]
    assert curve(w, "time/deploy_seconds") == [(1, 2.0), (2, 2.0)]
    tensors = shown(w).Tensors("extract/knowledge")
    assert [event.step for event in tensors] == [2, 4]
    assert tensors[0].tensor_proto.string_val[0] == b"    - H loses\n    - <b>G</b> wins"
    assert [event.step for event in shown(w).Tensors("evaluate/game")] == [1, 2]
    histograms = shown(w).Tensors("consolidate/response_tokens_histogram")
    assert [event.step for event in histograms] == [1, 2, 3, 4, 5, 6]


def test_tensorboard_reads_histograms_and_settings_back(tmp_path):
    w = Workdir(tmp_path / "run")
    w.root.mkdir()
    lengths = [20, 26, 26, 26]
    for number in (1, 2):  # the second time as a resumed run
        with Metrics(w) as metrics:
            metrics.histogram("response_tokens", number, lengths, "evaluate_start")
            fields = {"loss.top_k": 16, "model.thinking": True, "evaluate.curve": [1, 5]}
            metrics.settings(fields, {"final/pass_rate": number / 4}, step=number)
    events = shown(w)
    made = events.Tensors("evaluate/response_tokens_histogram")
    buckets = tensor_util.make_ndarray(made[0].tensor_proto)
    assert buckets[:, 2].sum() == 4 and (buckets[0, 0], buckets[-1, 1]) == (20, 26)
    assert buckets[0, 2] == 1 and buckets[-1, 2] == 3
    assert curve(w, "final/pass_rate") == [(1, 0.25), (2, 0.5)]
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    started = parse_session_start_info_plugin_data(content)
    assert started.group_name == ""  # see the test of two runs whose directories share a name
    assert started.hparams["loss.top_k"].number_value == 16
    assert started.hparams["model.thinking"].bool_value is True
    assert started.hparams["evaluate.curve"].string_value == "[1, 5]"
    other = Workdir(tmp_path / "other")
    other.root.mkdir()
    with Metrics(other, tensorboard=False) as metrics:
        metrics.settings({}, {}, step=1)
        metrics.histogram("x", 1, [1.0], "evaluate")
    assert not other.tensorboard.exists()


def test_a_point_that_is_written_again_is_there_once(tmp_path):
    """Whatever the kind, in one process and after a kill."""
    w = Workdir(tmp_path)
    for last in (3, 5):  # the second time as a run that was killed and resumed
        with Metrics(w, axis=AXIS) as metrics:
            for step in (1, 2, last):
                metrics.histogram("lengths", 2, [1, last], "consolidate", 1)
                metrics.text("game", 1, str(last), "evaluate_start")
                metrics.settings({"seed": last}, {"final/x": last}, step=1)
                metrics.scalars("evaluate_skills", 0, {"skill": last})
                metrics.scalars("consolidate", step, {"loss": last}, round=1)
    events = shown(w)
    for tag in ("consolidate/lengths_histogram", "evaluate/game", "_hparams_/session_start_info"):
        assert len(events.Tensors(tag)) == 1, tag
    assert events.Tensors("evaluate/game")[0].tensor_proto.string_val[0] == b"    5"
    assert curve(w, "final/x") == [(1, 5)] and curve(w, "evaluate_skills/skill") == [(0, 5)]
    assert curve(w, "consolidate/loss") == [(3, 3), (1, 5), (2, 5), (5, 5)]


def test_event_files_survive_a_kill_at_any_byte(tmp_path):
    """A file that ends within a record; events that were being written anew; what is kept."""
    straight = Workdir(tmp_path / "straight")
    straight.root.mkdir()
    with Metrics(straight, axis=AXIS) as metrics:
        for step in (1, 2, 3):
            metrics.scalars("consolidate", step, {"loss": step}, round=1)
    (file,) = straight.tensorboard.iterdir()
    data = file.read_bytes()
    for end in range(len(data) + 1):
        w = Workdir(tmp_path / str(end))
        w.tensorboard.mkdir(parents=True)
        (w.tensorboard / file.name).write_bytes(data[:end])
        (w.tensorboard / ".anew.tmp").write_bytes(data[: end // 2])
        with Metrics(w, axis=AXIS) as metrics:
            for step in (2, 3):
                metrics.scalars("consolidate", step, {"loss": step}, round=1)
        found = curve(w, "consolidate/loss")
        assert found in ([(1, 1), (2, 2), (3, 3)], [(2, 2), (3, 3)]), end
    both = Workdir(tmp_path / "both")  # killed before the old file was deleted
    both.tensorboard.mkdir(parents=True)
    for number in (1, 2):
        name = f"events.out.tfevents.{number:010d}.oel_jax"
        (both.tensorboard / name).write_bytes(data)
    Metrics(both, axis=AXIS).close()
    assert curve(both, "consolidate/loss") == [(1, 1), (2, 2), (3, 3)]


def test_rows_of_an_older_layout_are_shown_in_the_new_one(tmp_path):
    w = Workdir(tmp_path)
    with Metrics(w, tensorboard=False) as metrics:
        for step in (1, 2, 3):
            values = {"loss": step if step != 2 else float("nan")}
            metrics.scalars("consolidate", step, values, 2, time_values={"tokens/s": 7})
    older = w.tensorboard / "round_002" / "consolidate"
    older.mkdir(parents=True)
    (older / "events.out.tfevents.1.host").write_bytes(b"")
    (older / "plugins").mkdir()
    for _ in range(2):
        Metrics(w, axis=AXIS).close()
        found = curve(w, "consolidate/loss")
        assert [step for step, _ in found] == [4, 5, 6] and found[1][1] != found[1][1]
        assert curve(w, "consolidate/tokens/s") == [(4, 7), (5, 7), (6, 7)]
    assert (older / "plugins").is_dir()


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
    trials = {
        group.name.removesuffix("/tensorboard"): group.metric_values[0].value
        for group in answer.session_groups
    }
    assert trials == wanted
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
    assert curve(broken, "consolidate/x") == [(step, step) for step in range(1, 6)]
    assert curve(broken, "evaluate/x") == [(0, 9)]


def test_rewind_touches_only_its_stage_and_round(tmp_path):
    w = Workdir(tmp_path)
    with Metrics(w, tensorboard=False) as metrics:
        for stage, round_number in (("extract", 1), ("consolidate", 1), ("consolidate", 2)):
            for step in (1, 2):
                metrics.scalars(stage, step, {"x": 1}, round=round_number)
        metrics.rewind("consolidate", 2, 0)
        metrics.rewind("consolidate", 1, 1)
    left = [(row["stage"], row["round"], row["step"]) for row in read_metrics(w.metrics_file)]
    assert left == [("extract", 1, 1), ("extract", 1, 2), ("consolidate", 1, 1)]


def test_rows_are_on_disk_at_once_and_a_cut_last_line_goes(tmp_path):
    w = Workdir(tmp_path)
    metrics = Metrics(w, tensorboard=False)
    metrics.scalars("deploy", 1, {"x": 1})
    assert len(read_metrics(w.metrics_file)) == 1
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
        read_metrics(w.metrics_file)


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
