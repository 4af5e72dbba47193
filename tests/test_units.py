"""Sizes, bandwidths, speeds and token counts, read and written."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from localmistral.errors import UsageError
from localmistral.units import (
    format_bandwidth,
    format_bytes,
    format_speed,
    format_tokens,
    parse_bandwidth,
    parse_bytes,
    parse_speed,
    parse_tokens,
)

GIB = 1024**3


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("24GiB", 24 * GIB),
        ("24gib", 24 * GIB),
        (" 24 GiB ", 24 * GIB),
        ("24G", 24 * GIB),
        ("24GB", 24_000_000_000),
        ("4.1 GB", 4_100_000_000),
        ("0.5GiB", GIB // 2),
        ("512M", 512 * 1024**2),
        ("512MB", 512_000_000),
        ("1TiB", 1024**4),
        ("7kb", 7000),
        ("1048576", 1048576),
        ("100B", 100),
    ],
)
def test_a_size_is_read_with_decimal_and_binary_units_kept_apart(text: str, expected: int) -> None:
    assert parse_bytes(text) == expected


@pytest.mark.parametrize(
    "text",
    [
        "",
        "GiB",
        "24 parsecs",
        "-1GiB",
        "1e9",
        "1,5GB",
        "nan",
        "inf",
        "0",
        "0GiB",
        "24GiB@936GB/s",
        "٢٤GiB",
        "9" * 5000,
        "99999999999999999999PB",
        "1_000",
        "24 Gi B",
        "24GiB\n\x1b[31m",
        "0.2B",
    ],
)
def test_what_is_no_size_is_refused_in_one_printable_sentence(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_bytes(text)
    assert refusal.value.message.isprintable()
    assert len(refusal.value.message) < 160
    assert "GiB" in refusal.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("448GB/s", 448_000_000_000),
        ("936 gb/s", 936_000_000_000),
        ("1GiB/s", GIB),
        ("1.5TB/s", 15 * 10**11),
    ],
)
def test_a_bandwidth_is_read_in_bytes_per_second(text: str, expected: int) -> None:
    assert parse_bandwidth(text) == expected


@pytest.mark.parametrize(
    "text", ["448", "448GB", "448/s", "GB/s", "448GB/h", "/s", "", "448Gbit/s"]
)
def test_a_bandwidth_without_unit_or_second_is_refused_and_shown_whole(text: str) -> None:
    with pytest.raises(UsageError) as refusal:
        parse_bandwidth(text)
    assert repr(text) in refusal.value.message


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("32k", 32768),
        ("32K", 32768),
        ("1M", 1048576),
        ("4096", 4096),
        ("0.5k", 512),
        (" 8 k", 8192),
    ],
)
def test_k_is_1024_in_a_token_count(text: str, expected: int) -> None:
    assert parse_tokens(text) == expected


@pytest.mark.parametrize("text", ["", "k", "1.5", "0.3k", "-1", "0", "32kB", "4 096", "1e3", "32g"])
def test_a_token_count_must_be_whole_and_positive(text: str) -> None:
    with pytest.raises(UsageError, match="whole number of tokens"):
        parse_tokens(text)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("20", 20.0), ("12.5", 12.5), ("20t/s", 20.0), ("20 tok/s", 20.0), ("20 Tokens/s", 20.0)],
)
def test_a_speed_is_read_with_or_without_its_unit(text: str, expected: float) -> None:
    assert parse_speed(text) == expected


@pytest.mark.parametrize("text", ["", "t/s", "0", "-3", "20k", "20 km/h", "nan", "inf"])
def test_what_is_no_speed_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="is not a speed"):
        parse_speed(text)


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (0, "0 B"),
        (812, "812 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (44_459_982_848, "41.4 GiB"),
        (GIB - 1, "1.0 GiB"),
        (1024 * GIB - 1, "1.0 TiB"),
        (126_500_000_000, "117.8 GiB"),
        (-3 * GIB, "-3.0 GiB"),
        (5000 * 1024**5, "5000.0 PiB"),
    ],
)
def test_bytes_are_written_in_the_unit_that_keeps_them_short(count: int, expected: str) -> None:
    assert format_bytes(count) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (936e9, "936 GB/s"),
        (1792e9, "1792 GB/s"),
        (5.2e9, "5.2 GB/s"),
        (9.96e9, "10 GB/s"),
        (120e6, "120 MB/s"),
        (999.7e6, "1.0 GB/s"),
        (1.5e6, "1.5 MB/s"),
    ],
)
def test_a_bandwidth_is_written_as_in_data_sheets(count: float, expected: str) -> None:
    assert format_bandwidth(count) == expected


@pytest.mark.parametrize(
    ("count", "expected"),
    [
        (262144, "256k"),
        (1048576, "1M"),
        (5000, "5000"),
        (0, "0"),
        (1024, "1k"),
        (1536 * 1024, "1536k"),
    ],
)
def test_a_token_count_is_written_short_only_when_exact(count: int, expected: str) -> None:
    assert format_tokens(count) == expected


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        (92.94, "92.9 tokens/s"),
        (3752.4, "3,752 tokens/s"),
        (0.0, "0.0 tokens/s"),
        (999.96, "1,000 tokens/s"),
    ],
)
def test_a_speed_is_written_with_the_digits_that_mean_something(
    speed: float, expected: str
) -> None:
    assert format_speed(speed) == expected


@given(st.integers(min_value=1, max_value=2**63 - 1))
def test_a_written_token_count_reads_back_as_itself(count: int) -> None:
    assert parse_tokens(format_tokens(count)) == count


@given(st.integers(min_value=1, max_value=2**62))
def test_written_bytes_read_back_within_the_printed_digit(count: int) -> None:
    assert parse_bytes(format_bytes(count)) == pytest.approx(count, rel=0.051)


@given(st.text(max_size=30))
def test_any_text_is_read_or_refused_and_nothing_else(text: str) -> None:
    for parse in (parse_bytes, parse_bandwidth, parse_tokens, parse_speed):
        try:
            assert parse(text) > 0
        except UsageError as refusal:
            assert refusal.message.isprintable()
