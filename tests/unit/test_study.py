import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.storages._rdb.models import BaseModel
from optuna.trial import BaseTrial, TrialState, create_trial

from saltray.records import study as studies
from saltray.records.study import Place, StudyError, count, create_study, load_study
from saltray.search.limits import ended_without_gain
from saltray.search.warmstart import adopt, is_adopted


@pytest.fixture(autouse=True)
def quiet() -> None:
    optuna.logging.set_verbosity(optuna.logging.WARNING)


class TestRefusals:
    def test_a_file_that_is_no_database(self, tmp_path: Path) -> None:
        content = b"not a database at all, by any means" * 50
        (tmp_path / "study.db").write_bytes(content)
        with pytest.raises(StudyError, match=r"study\.db: damaged, or no SQLite database"):
            load_study(tmp_path)
        assert (tmp_path / "study.db").read_bytes() == content

    def test_a_corrupted_study(self, tmp_path: Path) -> None:
        study = create_study(Place(tmp_path))
        for _ in range(200):
            study.add_trial(create_trial(value=0.5))
        file = tmp_path / "study.db"
        content = bytearray(file.read_bytes())
        content[len(content) // 2 : len(content) // 2 + 20_000] = b"\xff" * 20_000
        file.write_bytes(content)
        with pytest.raises(StudyError, match=r"study\.db: damaged"):
            load_study(tmp_path)
        assert file.read_bytes() == bytes(content)

    def test_a_truncated_study(self, tmp_path: Path) -> None:
        create_study(Place(tmp_path))
        file = tmp_path / "study.db"
        content = file.read_bytes()[: file.stat().st_size // 2]
        file.write_bytes(content)
        with pytest.raises(StudyError, match=r"study\.db: damaged"):
            load_study(tmp_path)
        assert file.read_bytes() == content

    def test_somebody_elses_database_is_not_written_to(self, tmp_path: Path) -> None:
        with sqlite3.connect(tmp_path / "study.db") as database:
            database.execute("CREATE TABLE wells (depth REAL)")
        database.close()
        before = (tmp_path / "study.db").read_bytes()
        for use in (load_study, lambda folder: create_study(Place(folder))):
            with pytest.raises(StudyError, match="not of Optuna's"):
                use(tmp_path)
        assert (tmp_path / "study.db").read_bytes() == before

    def test_absent(self, tmp_path: Path) -> None:
        with pytest.raises(StudyError, match="not the folder of a run"):
            load_study(tmp_path)
        assert not list(tmp_path.iterdir())

    @pytest.mark.filterwarnings("ignore::optuna.exceptions.ExperimentalWarning")
    def test_a_study_of_another_metric(self, tmp_path: Path) -> None:
        study = optuna.create_study(storage=studies.open_storage(Place(tmp_path)), study_name="saltray")
        study.set_metric_names(["dice"])
        with pytest.raises(StudyError, match=r"another metric \(dice\)"):
            load_study(tmp_path)

    def test_a_study_of_a_newer_saltray(self, tmp_path: Path) -> None:
        create_study(Place(tmp_path)).set_user_attr("format", 99)
        with pytest.raises(StudyError, match="newer saltray"):
            load_study(tmp_path)

    def test_a_study_of_another_name(self, tmp_path: Path) -> None:
        optuna.create_study(storage=studies.open_storage(Place(tmp_path)), study_name="wells")
        with pytest.raises(StudyError, match="there are: wells"):
            load_study(tmp_path)

    @pytest.mark.parametrize(
        ("url", "words"),
        [
            ("sqlite:///study.db", "a PostgreSQL server is meant"),
            ("a study", "not a URL"),
            ("postgresql://saltray:secret@127.0.0.1:1/none", "127.0.0.1:1/none"),
        ],
    )
    def test_servers(self, tmp_path: Path, url: str, words: str) -> None:
        with pytest.raises(StudyError) as error:
            studies.refuse_taken_name(Place(tmp_path, url))
        assert words in str(error.value)
        assert "secret" not in str(error.value)


def test_the_server_is_named_without_its_password() -> None:
    end = "host:5432/db"
    for url in (f"me:secret@{end}", f"me@{end}?password=secret", f"me@{end}?sslpassword=secret"):
        assert studies.without_password(f"postgresql://{url}") == f"postgresql://me@{end}"


def known(state: TrialState, params: dict[str, Any], *values: float) -> optuna.trial.FrozenTrial:
    distributions: dict[str, Any] = {
        "kind": optuna.distributions.CategoricalDistribution(["a", "b"]),
        "rate": optuna.distributions.FloatDistribution(0, 10),
        "old": optuna.distributions.IntDistribution(0, 9),
    }
    return create_trial(
        state=state,
        value=values[-1] if state == TrialState.COMPLETE else None,
        params=params,
        distributions={name: distributions[name] for name in params},
        intermediate_values=dict(enumerate(values, 1)),
    )


def draw(trial: BaseTrial) -> None:
    """Overlaps with `known`: `kind` has a third choice, `rate` a narrower range, `old` is gone."""
    kind = trial.suggest_categorical("kind", ["a", "b", "c"])
    trial.suggest_float("rate", 0, 5)
    if kind == "b":
        trial.suggest_int("new", 1, 3)


class TestAdopt:
    @pytest.fixture
    def other(self) -> optuna.Study:
        study = optuna.create_study(direction="maximize")
        study.add_trial(known(TrialState.COMPLETE, {"kind": "a", "rate": 1.5, "old": 3}, 0.1, 0.7))
        study.add_trial(known(TrialState.PRUNED, {"kind": "b", "rate": 9.0, "old": 3}, 0.2))
        study.add_trial(known(TrialState.FAIL, {"kind": "b", "rate": 2.0, "old": 3}))
        study.add_trial(known(TrialState.COMPLETE, {"old": 4}, 0.9))
        return study

    def test_results_are_taken_over_where_the_spaces_overlap(self, tmp_path: Path, other: Any) -> None:
        study = create_study(Place(tmp_path))
        assert adopt(study, other, draw, "runs/before", compares=True) == (2, 0)
        taken = study.trials
        assert [t.params for t in taken] == [{"kind": "a", "rate": 1.5}, {"kind": "b"}]
        assert [t.state for t in taken] == [TrialState.COMPLETE, TrialState.PRUNED]
        assert [t.intermediate_values for t in taken] == [{1: 0.1, 2: 0.7}, {1: 0.2}]
        assert taken[0].user_attrs == {"adopted": "runs/before trial 0"}
        assert count(study).ended == 0
        # The study goes on with the new space.
        for _ in range(3):
            trial = study.ask()
            draw(trial)
            study.tell(trial, 0.5)
        assert count(study).complete == 3
        with pytest.raises(StudyError, match="no trial"):
            studies.best_trial(study)

    def test_cut_off_it_may_be_done_again(self, tmp_path: Path, other: Any) -> None:
        study = create_study(Place(tmp_path))
        other.add_trial(known(TrialState.COMPLETE, {"rate": 4.0}, 0.8))

        def fails(trial: BaseTrial) -> None:
            if trial.suggest_float("rate", 0, 5) == 4.0:
                raise ValueError("no such network")
            trial.suggest_categorical("kind", ["a", "b", "c"])

        assert not is_adopted(study)
        for _ in range(2):
            assert adopt(study, other, fails, "runs/before", compares=True) == (2, 0)
        assert [t.params for t in study.trials] == [{"rate": 1.5, "kind": "a"}, {"kind": "b"}]
        assert is_adopted(study)

    def test_the_best_are_proposed_where_scores_do_not_compare(self, tmp_path: Path, other: Any) -> None:
        study = create_study(Place(tmp_path))
        assert adopt(study, other, draw, "runs/before", compares=False) == (0, 2)
        assert [t.state for t in study.trials] == [TrialState.WAITING] * 2
        trial = study.ask()
        draw(trial)
        assert trial.params == {"kind": "a", "rate": 1.5}

    def test_what_was_cut_off_is_proposed_by_its_score(self, tmp_path: Path, other: Any) -> None:
        (folder := tmp_path / "other").mkdir()
        other.add_trial(known(TrialState.WAITING, {"kind": "b", "rate": 3.0}, 0.6, 0.8))
        other.add_trial(known(TrialState.WAITING, {"kind": "b", "rate": 4.0}))  # it never began
        study = create_study(Place(tmp_path))
        assert adopt(study, other, draw, "runs/before", compares=True) == (2, 1)
        assert [t.state for t in study.trials] == [
            TrialState.COMPLETE,
            TrialState.PRUNED,
            TrialState.WAITING,
        ]
        study = create_study(Place(folder))
        assert adopt(study, other, draw, "runs/before", compares=False) == (0, 3)
        trial = study.ask()
        draw(trial)
        assert (trial.params["kind"], trial.params["rate"]) == ("b", 3.0)


def test_a_database_without_the_study_is_told_from_a_broken_one(tmp_path: Path) -> None:
    with pytest.raises(studies.NoStudyError, match=r"no study\.db"):
        load_study(tmp_path)
    studies.open_storage(Place(tmp_path))  # as a session leaves it that is killed before it makes the study
    with pytest.raises(studies.NoStudyError, match="no such study in it; there are: none"):
        load_study(tmp_path)
    (tmp_path / "study.db").write_bytes(b"SQLite format 3\0" * 64)
    with pytest.raises(StudyError) as caught:
        load_study(tmp_path)
    assert not isinstance(caught.value, studies.NoStudyError)


def test_checkpoints_are_found_where_the_run_lies_now(tmp_path: Path) -> None:
    study = create_study(Place(tmp_path))
    written = tmp_path / "before/trials/session-01/0000"
    for name in ("checkpoint_000001", "checkpoint_000002"):
        (written / name).mkdir(parents=True)
    newest, earlier = (str(written / f"checkpoint_00000{n}") for n in (2, 1))
    study.add_trial(create_trial(value=0.5, user_attrs={"checkpoint": newest, "checkpoint_before": earlier}))
    (trial,) = study.trials
    assert studies.checkpoints_of(study, trial) == [newest, earlier]
    (tmp_path / "before").rename(tmp_path / "now")
    assert studies.checkpoints_of(study, trial) == []
    studies.keep_trials_at(study, str(tmp_path / "now/trials"))
    moved = [str(tmp_path / "now/trials/session-01/0000" / Path(path).name) for path in (newest, earlier)]
    assert studies.checkpoints_of(study, trial) == moved
    studies.keep_trials_at(study, "s3://bucket/run/trials")
    first, _ = studies.checkpoints_of(study, trial)
    assert first == "s3://bucket/run/trials/session-01/0000/checkpoint_000002"


def test_the_best_trial_is_lost_with_its_checkpoints(tmp_path: Path) -> None:
    study = create_study(Place(tmp_path))
    for number, score in enumerate((0.5, 0.7, 0.9)):
        (tmp_path / str(number)).mkdir()
        more = {"checkpoint": str(tmp_path / str(number))} if number < 2 else {}  # the third never had one
        study.add_trial(create_trial(value=score, intermediate_values={1: score}, user_attrs=more))
    assert studies.lost_trial(study) is None
    (tmp_path / "0").rmdir()
    assert studies.lost_trial(study) is None
    (tmp_path / "1").rmdir()
    lost = studies.lost_trial(study)
    assert lost is not None and lost.number == 1


def test_ended_without_gain_counts_by_the_time_of_the_end(tmp_path: Path) -> None:
    study = create_study(Place(tmp_path))
    assert ended_without_gain(study) == 0
    for value in (0.3, 0.5, 0.4, 0.5):
        study.add_trial(known(TrialState.COMPLETE, {}, value))
    study.add_trial(known(TrialState.FAIL, {}))
    assert ended_without_gain(study) == 2


def test_a_search_that_was_cut_off_while_its_tables_were_made_goes_on(tmp_path: Path) -> None:
    tables = BaseModel.metadata.sorted_tables
    for number in (1, 3, len(tables)):
        folder = tmp_path / str(number)
        folder.mkdir()
        engine = sqlalchemy.create_engine(f"sqlite:///{folder}/study.db")
        BaseModel.metadata.create_all(engine, tables=tables[:number])
        engine.dispose()
        with pytest.raises(studies.NoStudyError, match="has just begun"):
            load_study(folder)
        create_study(Place(folder))
        assert not load_study(folder).trials


def test_who_reads_a_study_that_is_being_made_does_not_make_its_tables(tmp_path: Path) -> None:
    file = tmp_path / "study.db"
    file.touch()
    with pytest.raises(studies.NoStudyError, match="has just begun"):
        load_study(tmp_path)
    assert file.stat().st_size == 0
    create_study(Place(tmp_path))
    assert not load_study(tmp_path).trials
    with closing(sqlite3.connect(file)) as database:
        database.execute("DROP TABLE alembic_version")  # the one that Optuna makes last
    before = file.read_bytes()
    with pytest.raises(studies.NoStudyError, match="has just begun"):
        load_study(tmp_path)
    assert file.read_bytes() == before
