import pytest

from saltray.search import processes


def test_all_ended_trials_processes_are_kept_until_no_trial_came_for_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [100.0]
    monkeypatch.setattr("saltray.search.processes.monotonic", lambda: now[0])
    cache = processes.KeepingCache()
    assert cache.cache_object("one CPU", "first")
    now[0] += processes.IDLE_SECONDS / 2
    assert cache.cache_object("one CPU", "second")  # no trial waits: Tune's own refuses it
    assert list(cache.flush_cached_objects()) == []
    now[0] += processes.IDLE_SECONDS / 2
    assert list(cache.flush_cached_objects()) == ["first"]
    assert cache.num_cached_objects == 1
    assert cache.pop_cached_object("one CPU") == "second"
    now[0] += processes.IDLE_SECONDS
    assert cache.cache_object("one CPU", "second")  # used meanwhile: its time begins anew
    assert list(cache.flush_cached_objects()) == []
    assert list(cache.flush_cached_objects(force_all=True)) == ["second"]
    assert cache.num_cached_objects == 0
