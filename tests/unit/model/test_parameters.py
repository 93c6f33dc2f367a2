"""Capabilities and parameters: QEMU's order, defaults, ranges and sentences; all-or-nothing, never silently."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from migrated.errors import CommandError
from migrated.model.parameters import CAPABILITIES, PARAMETERS, Capabilities, Kind, Parameters

NOT_HERE = "is not implemented by this version of migrated"


def refused(changes: dict[str, object], base: Parameters | None = None) -> str:
    """Return why the parameters were refused."""
    with pytest.raises(CommandError) as caught:
        (base or Parameters()).replace(changes)
    assert caught.value.qmp_class == "GenericError"
    return str(caught.value)


# -- capabilities ----------------------------------------------------------------------------------------------


IN_ORDER = (
    "xbzrle rdma-pin-all auto-converge zero-blocks compress events postcopy-ram x-colo release-ram block"
    " return-path pause-before-switchover multifd dirty-bitmaps postcopy-blocktime late-block-activate"
    " x-ignore-shared validate-uuid background-snapshot zero-copy-send postcopy-preempt"
)


def test_capabilities_stand_in_qemus_order() -> None:
    assert list(Capabilities().all()) == IN_ORDER.split()


def test_only_the_return_path_is_on() -> None:
    assert [name for name, on in Capabilities().all().items() if on] == ["return-path"]


def test_capabilities_are_replaced() -> None:
    before = Capabilities()
    after = before.replace({"events": True, "return-path": True})
    assert (after.get("events"), before.get("events")) == (True, False)
    assert after.replace({"events": False}).all() == before.all()


def test_the_return_path_cannot_be_switched_off() -> None:
    with pytest.raises(CommandError, match="Capability 'return-path' cannot be switched off: without an answer"):
        Capabilities().replace({"return-path": False})


@pytest.mark.parametrize("name", CAPABILITIES)
def test_a_capability_works_or_is_refused(name: str) -> None:
    if CAPABILITIES[name].implemented:
        assert Capabilities().replace({name: True}).get(name)
        return
    with pytest.raises(CommandError) as caught:
        Capabilities().replace({"events": True, name: True})
    assert str(caught.value) == f"Capability '{name}' {NOT_HERE}"
    # What is off may be set to off.
    assert Capabilities().replace({name: False}).all() == Capabilities().all()


def test_capabilities_that_do_not_exist() -> None:
    for on in (True, False):
        with pytest.raises(CommandError, match="Parameter 'capability' does not accept value 'warp'"):
            Capabilities().replace({"warp": on})
    with pytest.raises(CommandError):
        Capabilities().get("warp")


# -- parameters ------------------------------------------------------------------------------------------------


def test_defaults_are_qemus_but_for_the_bandwidth() -> None:
    ours = {name: value for name, value in Parameters().all().items() if name.startswith("x-migrated-")}
    qemus = {name: value for name, value in Parameters().all().items() if name not in ours}
    assert list(qemus.items()) == [
        ("announce-initial", 50),
        ("announce-max", 550),
        ("announce-rounds", 5),
        ("announce-step", 100),
        ("compress-level", 1),
        ("compress-threads", 8),
        ("decompress-threads", 2),
        ("compress-wait-thread", True),
        ("throttle-trigger-threshold", 50),
        ("cpu-throttle-initial", 20),
        ("cpu-throttle-increment", 10),
        ("cpu-throttle-tailslow", False),
        ("tls-creds", ""),
        ("tls-hostname", ""),
        ("tls-authz", ""),
        ("max-bandwidth", 0),
        ("downtime-limit", 300),
        ("x-checkpoint-delay", 20000),
        ("block-incremental", False),
        ("multifd-channels", 2),
        ("xbzrle-cache-size", 67108864),
        ("max-postcopy-bandwidth", 0),
        ("max-cpu-throttle", 99),
        ("multifd-compression", "none"),
        ("multifd-zlib-level", 1),
        ("multifd-zstd-level", 1),
    ]
    assert ours["x-migrated-stop-timeout"] == 2000
    assert ours["x-migrated-answer-timeout"] == 30000
    assert ours["x-migrated-silence-timeout"] == 10000
    # block-bitmap-mapping shows only once it is set.
    assert Parameters().get("block-bitmap-mapping") is None


def test_parameters_are_replaced() -> None:
    before = Parameters()
    after = before.replace({"downtime-limit": 50, "cpu-throttle-tailslow": True, "max-bandwidth": 500 << 20})
    assert after.integer("downtime-limit") == 50
    assert after.get("cpu-throttle-tailslow") is True
    assert after.all()["max-bandwidth"] == 500 << 20
    assert before.all() == Parameters().all()
    assert after.replace({"downtime-limit": 60}).integer("max-bandwidth") == 500 << 20


def test_all_or_nothing() -> None:
    base = Parameters().replace({"downtime-limit": 50})
    refused({"downtime-limit": 60, "max-cpu-throttle": 1}, base)
    assert base.integer("downtime-limit") == 50


@pytest.mark.parametrize(
    ("name", "value", "text"),
    [
        # [V] literally so
        ("downtime-limit", 2000001,
         "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms"),
        # [V] negative numbers wrap to huge ones and then meet the range check
        ("downtime-limit", -1, "Parameter 'downtime_limit' expects an integer in the range of 0 to (2000 * 1000) ms"),
        ("max-bandwidth", -1,
         "Parameter 'max_bandwidth' expects an integer in the range of 0 to 9223372036854775807 bytes/second"),
        ("announce-initial", 100001, "Parameter 'announce_initial' expects a value between 0 and 100000"),
        ("announce-rounds", 1001, "Parameter 'announce_rounds' expects a value between 0 and 1000"),
        ("announce-step", 0, "Parameter 'announce_step' expects a value between 0 and 10000"),
        ("compress-level", 10, "Parameter 'compress_level' expects a value between 0 and 9"),
        ("multifd-zstd-level", 21, "Parameter 'multifd_zstd_level' expects a value between 0 and 20"),
        ("multifd-channels", 0, "Parameter 'multifd_channels' expects a value between 1 and 255"),
        ("multifd-channels", 256, "Parameter 'multifd-channels' expects uint8_t"),
        ("x-checkpoint-delay", 1 << 32, "Parameter 'x-checkpoint-delay' expects uint32_t"),
        ("throttle-trigger-threshold", 101,
         "Parameter 'throttle_trigger_threshold' expects an integer in the range of 1 to 100"),
        ("cpu-throttle-initial", 100, "Parameter 'cpu_throttle_initial' expects an integer in the range of 1 to 99"),
        ("max-cpu-throttle", 19,
         "Parameter 'max_cpu_throttle' expects an integer in the range of cpu_throttle_initial to 99"),
        ("xbzrle-cache-size", 5000,
         "Parameter 'xbzrle_cache_size' expects a power of two no less than the target page size"),
        ("xbzrle-cache-size", 2048,
         "Parameter 'xbzrle_cache_size' expects a power of two no less than the target page size"),
        ("x-migrated-stop-timeout", 0,
         "Parameter 'x_migrated_stop_timeout' expects an integer in the range of 1 to 3600000 ms"),
        ("downtime-limit", "300", "Parameter 'downtime-limit' expects uint64"),
        ("downtime-limit", 1.5, "Parameter 'downtime-limit' expects uint64"),
        ("downtime-limit", True, "Parameter 'downtime-limit' expects uint64"),
        ("downtime-limit", None, "Parameter 'downtime-limit' expects uint64"),
        ("downtime-limit", 1 << 64, "Parameter 'downtime-limit' expects uint64"),
        ("cpu-throttle-tailslow", 1, "Invalid parameter type for 'cpu-throttle-tailslow', expected: boolean"),
        ("tls-creds", 1, "Invalid parameter type for 'tls-creds', expected: StrOrNull"),
        ("multifd-compression", 1, "Invalid parameter type for 'multifd-compression', expected: string"),
        ("multifd-compression", "lz4", "Parameter 'multifd-compression' does not accept value 'lz4'"),
        ("block-bitmap-mapping", 1, "Invalid parameter type for 'block-bitmap-mapping', expected: array"),
        ("block-bitmap-mapping", [], f"Parameter 'block-bitmap-mapping' {NOT_HERE}"),
        ("block-incremental", True, f"Parameter 'block-incremental' {NOT_HERE}"),
        ("tls-creds", "tls0", f"Parameter 'tls-creds' {NOT_HERE}"),
        ("compress-level", 2, f"Parameter 'compress-level' {NOT_HERE}"),
        ("warp", 9, "Parameter 'warp' is unexpected"),
    ],
)  # fmt: skip
def test_refusals(name: str, value: object, text: str) -> None:
    assert refused({name: value}) == text


def test_the_ends_of_every_range_are_inside() -> None:
    for row in PARAMETERS.values():
        if row.kind in (Kind.SIZE, Kind.UINT8, Kind.UINT64) and row.implemented:
            low = 20 if row.name == "max-cpu-throttle" else row.low
            for value in (low, row.high):
                changes: dict[str, object] = {row.name: value}
                assert Parameters().replace(changes).integer(row.name) == value


def test_the_highest_throttle_is_checked_against_the_first() -> None:
    both = Parameters().replace({"cpu-throttle-initial": 40, "max-cpu-throttle": 40})
    assert both.integer("max-cpu-throttle") == 40
    assert "max_cpu_throttle" in refused({"cpu-throttle-initial": 41}, both)


def test_a_default_is_no_change() -> None:
    assert Parameters().replace({**Parameters().all(), "tls-creds": None}).all() == Parameters().all()


def test_what_is_no_number() -> None:
    with pytest.raises(TypeError, match="tls-creds is not a number"):
        Parameters().integer("tls-creds")
    with pytest.raises(CommandError, match="'warp' is unexpected"):
        Parameters().get("warp")


NUMBERS = st.integers() | st.integers(0, 300) | st.floats()
JSON = st.none() | st.booleans() | NUMBERS | st.text(max_size=9) | st.lists(st.integers(), max_size=2)


@given(st.dictionaries(st.sampled_from([*PARAMETERS, "else"]), JSON, max_size=4))
def test_anything_is_taken_whole_or_refused(changes: dict[str, object]) -> None:
    try:
        after = Parameters().replace(changes)
    except CommandError:
        return
    assert after.all().keys() == Parameters().all().keys()
    for name, value in after.all().items():
        assert type(value) is type(PARAMETERS[name].default)


def test_capabilities_that_do_not_go_together() -> None:
    one = Capabilities().replace({"multifd": True})
    one.refuse_conflicts()
    with pytest.raises(CommandError, match="Multifd is not compatible with xbzrle"):
        one.replace({"xbzrle": True}).refuse_conflicts()
