"""Measured profiles: the layouts, what is refused and by which name, and bad files."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from narrows.core.errors import NarrowsError
from narrows.machines.load import load
from narrows.measure.profiles import Profile, limits, read

A100 = load("a100-80")
HEADER = "op,precision,m,n,k,batch,groups,peers,flops,bytes,microseconds\n"


def plain(folder: Path, *lines: str, header: str = HEADER, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_text(header + "".join(line + "\n" for line in lines))
    return path


def reasons(profile: Profile) -> dict[int, str]:
    return {r.row: r.reason for r in profile.refused}


def test_work_follows_from_the_shape(tmp_path):
    path = plain(
        tmp_path,
        "matmul,bf16,512,4096,1024,2,,,,,400",
        "attention_prefill,bf16,100,300,64,32,8,,,,100",
        "attention_decode,fp8,,300,64,32,8,,,,100",
        "norm,fp32,,,,,,,1000,2000,5",
        "all_reduce,bf16,,,,,,4,,1e6,60",
    )
    rows = read(path).rows
    assert rows.flops.tolist() == pytest.approx(
        [2 * 512 * 4096 * 1024 * 2, 4 * 32 * 64 * (100 * 200 + 5050), 4 * 32 * 64 * 300, 1000, 0]
    )
    assert rows.bytes.tolist() == pytest.approx([
        2 * 2 * (512 * 1024 + 1024 * 4096 + 512 * 4096), 2 * 64 * 2 * (32 * 100 + 8 * 300),
        2 * 64 * (32 + 8 * 300), 2000, 1e6,
    ])  # fmt: skip
    assert rows.seconds.tolist() == pytest.approx([4e-4, 1e-4, 1e-4, 5e-6, 6e-5])


@pytest.mark.parametrize(
    ("unit", "value"),
    [("seconds", 1e-4), ("milliseconds", 0.1), ("microseconds", 100), ("nanoseconds", 1e5)],
)
def test_the_name_of_the_column_is_the_unit(tmp_path, unit, value):
    path = plain(tmp_path, f"norm,fp16,1e6,{value}", header=f"op,precision,bytes,{unit}\n")
    assert read(path).rows.seconds[0] == pytest.approx(1e-4)


@pytest.mark.parametrize(("line", "told"), [
    ("matmul,,512,4096,4096,1,,,,,88", "precision not declared"),
    ("matmul,q7,512,4096,4096,1,,,,,88", "'q7' is not known"),
    ("matmul,bf16,512,4096,4096,1,,,,,1", "faster than the physical limit"),
    ("matmul,bf16,512,4096,4096,1,,,,,nan", "not a number"),
    ("matmul,bf16,512,4096,4096,1,,,,,", "not a number"),
    ("matmul,bf16,512,4096,4096,1,,,,,0", "not above zero"),
    ("matmul,bf16,512,4096,4096,1,,,,,-3", "not above zero"),
    ("matmul,bf16,512,four,4096,1,,,,,88", "n is not a number"),
    ("matmul,bf16,-512,4096,4096,1,,,,,88", "m is below zero"),
    ("matmul,bf16,,,,,,,,,88", "no work: give m, n, k, or flops and bytes"),
    ("matmull,bf16,512,4096,4096,1,,,,,88", "did you mean matmul"),
    ("attention_prefill,bf16,512,256,128,32,,,,,88", "at least m"),
    ("all_reduce,bf16,,,,,,1,,1e6,60", "peers must be 2 or more"),
    ("all_reduce,bf16,,,,,,64,,1e6,60", "more ranks than link"),
])  # fmt: skip
def test_what_cannot_be_right_is_refused_by_line_and_reason(tmp_path, line, told):
    good = "matmul,bf16,512,4096,4096,1,,,,,88"
    profile = read(plain(tmp_path, good, line, good), A100)
    assert len(profile) == 2
    assert list(reasons(profile)) == [3]
    assert told in reasons(profile)[3]


def test_a_precision_the_machine_lacks_is_refused(tmp_path):
    path = plain(tmp_path, "matmul,bf16,512,512,512,,,,,,90", "matmul,fp64,512,512,512,,,,,,90")
    profile = read(path, load("m2-pro"))
    assert "no unit for fp64" in reasons(profile)[3]
    assert len(profile) == 1


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_a_file_in_another_unit_is_refused_as_a_whole(tmp_path, factor):
    shapes = [(m, n, k) for m in (1, 64, 512, 4096) for n in (1024, 8192) for k in (1024, 8192)]
    lines: list[str] = []
    for m, n, k in shapes:
        best = max(2 * m * n * k / 312e12, 2 * (m * k + k * n + m * n) / 2.039e12)
        lines.append(f"matmul,fp16,{m},{n},{k},1,,,,,{(1.4 * best + 6e-6) * 1e6 * factor}")
    with pytest.raises(NarrowsError, match=r"wrong unit.*looks like"):
        read(plain(tmp_path, *lines), A100)
    honest = [line.rsplit(",", 1) for line in lines]
    fine = plain(tmp_path, *(f"{a},{float(b) / factor}" for a, b in honest))
    assert len(read(fine, A100)) == len(lines)


def test_without_a_precision_column_nothing_is_left(tmp_path):
    path = plain(tmp_path, "matmul,512,512,512,10", header="op,m,n,k,microseconds\n")
    with pytest.raises(NarrowsError, match="precision not declared"):
        read(path, A100)


def test_vidur_operators_are_milliseconds_and_split_over_devices(tmp_path):
    columns = ["attn_pre_proj", "attn_post_proj", "mlp_up_proj", "mlp_down_proj", "mlp_act"]
    header = ",".join(f"time_stats.{c}.median" for c in columns) + (
        ",n_head,n_kv_head,n_embd,n_expanded_embd,vocab_size,use_gated_mlp,num_tokens,"
        "num_tensor_parallel_workers\n")  # fmt: skip
    rows = read(plain(tmp_path, "1,1,1,1,1,32,8,4096,14336,32000,True,100,4", header=header)).rows
    found = {i: (m, n, k) for i, m, n, k in zip(rows.item, rows.m, rows.n, rows.k, strict=True)}
    assert found["attn_pre_proj"] == (100, (32 + 16) * 128 / 4, 4096)
    assert found["attn_post_proj"] == (100, 4096, 1024)
    assert found["mlp_up_proj"] == (100, 2 * 14336 / 4, 4096)
    assert found["mlp_down_proj"] == (100, 4096, 14336 / 4)
    assert rows.bytes[rows.item == "mlp_act.silu"] == pytest.approx(100 * 3 * 14336 / 4 * 2)
    assert set(rows.seconds) == {1e-3}
    assert set(rows.precision) == {"fp16"}


def test_collectives_between_nodes_are_refused(tmp_path):
    header = "time_stats.all_reduce.median,num_workers,size,collective,devices_per_node\n"
    lines = ["0.06,2,1000000,all_reduce,2", "0.06,8,1000000,all_reduce,4"]
    profile = read(plain(tmp_path, *lines, header=header), A100)
    assert len(profile) == 1
    assert "between nodes" in reasons(profile)[3]
    pairs = plain(tmp_path, "0.06,4,1000000,all_reduce,4", lines[0], header=header,
                  name="net-pairwise.csv")  # fmt: skip
    assert "linked in pairs" in reasons(read(pairs, A100))[2]


def test_attention_tables_share_heads_over_devices(tmp_path):
    header = "n_q_heads,n_kv_heads,head_dim,tp,dtype,kv_dtype,batch_size,kv_len,latency_us\n"
    path = plain(tmp_path, "64,8,128,4,bf16,fp8,16,1000,40", "64,8,128,4,,bf16,16,1000,40",
                 header=header)  # fmt: skip
    profile = read(path)
    assert profile.rows.bytes[0] == pytest.approx(16 * (2 * 16 * 128 * 2 + 2 * 2 * 1000 * 128))
    assert "precision not declared" in reasons(profile)[3]


def test_gzipped_is_read_as_it_is(tmp_path):
    path = tmp_path / "rows.csv.gz"
    path.write_bytes(gzip.compress((HEADER + "norm,fp16,,,,,,,,1e6,5\n").encode()))
    assert len(read(path)) == 1


@pytest.mark.parametrize(("content", "told"), [
    (b"", "empty"),
    (b"op,precision,bytes,seconds\n", "no rows"),
    (b"op,op,bytes,seconds\nnorm,norm,1,1\n", "twice"),
    (b"op,precision,bytes,seconds\nnorm,fp16,1\n", "3 fields where the header has 4"),
    (b"op,precision,bytes,seconds,milliseconds\nnorm,fp16,1,1,1\n", "both give the time"),
    (b"op,precision,byte,seconds\nnorm,fp16,1,1\n", "did you mean bytes"),
    (b"a,b\n1,2\n", "not a layout known"),
    (b"prompt_time,token_time\n1,2\n", "whole requests"),
    (b"time_stats.all_reduce.median\n1\n", "no column"),
    (b"time_stats.other.median,n_head,n_kv_head,n_embd,n_expanded_embd,num_tokens,"
     b"num_tensor_parallel_workers,use_gated_mlp\n1,1,1,1,1,1,1,1\n", "none of its time_stats"),
    (b"latency_us,kv_len,seq_len\n1,1,1\n", "two files"),
    (b"\x1f\x8b\x08broken", "cannot be read"),
    (b"\xff\xfe\x00op", "not UTF-8"),
    (b"op,seconds\nno\x00rm,1\n", ""),
])  # fmt: skip
def test_bad_files_end_in_one_sentence(tmp_path, content, told):
    path = tmp_path / "bad.csv"
    path.write_bytes(content)
    with pytest.raises(NarrowsError) as refused:
        read(path, A100)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)
    assert str(path) in str(refused.value)


def test_no_file_and_no_files(tmp_path):
    with pytest.raises(NarrowsError, match="no such profile"):
        read(tmp_path / "nowhere.csv")
    with pytest.raises(NarrowsError, match="no such profile"):
        read(tmp_path)
    with pytest.raises(NarrowsError, match="no profile given"):
        read([])


def test_a_cache_of_the_machine_lifts_the_limit(tmp_path):
    here = load("epyc-7763")
    path = plain(tmp_path, "norm,fp32,,,,,,,,1e5,50", "norm,fp32,,,,,,,,1e10,1e6")
    rows = read(path).rows
    _, moved = limits(rows, here)
    slow = rows.bytes / here.bandwidth(here.memory)
    assert moved[1] == pytest.approx(slow[1])
    assert (moved[0] < slow[0]) == bool(here.caches)


CELLS = st.sampled_from(
    ["matmul", "norm", "bf16", "", "nan", "inf", "-1", "0", "1e400", "7", "1e3", '"', "a,b", "\t"]
) | st.text(max_size=6)
HEADERS = st.lists(
    st.sampled_from([*HEADER.strip().split(","), "seconds", "name", "time_stats.add.median",
                     "time_stats.attn_decode.median", "time_stats.all_reduce.median", "n_embd",
                     "n_head", "latency_us", "kv_len", "seq_len", "num_workers", "size", "x"]),
    min_size=1, max_size=9, unique=True,
)  # fmt: skip


@given(st.data())
@settings(deadline=None, max_examples=300, suppress_health_check=[HealthCheck.too_slow])
def test_any_text_is_read_or_refused(tmp_path_factory, data):
    header = data.draw(HEADERS)
    lines = data.draw(st.lists(st.lists(CELLS, min_size=len(header), max_size=len(header)),
                               max_size=5))  # fmt: skip
    path = tmp_path_factory.mktemp("fuzz") / "fuzz.csv"
    path.write_text("\n".join([",".join(header), *map(",".join, lines)]), errors="ignore")
    machine = data.draw(st.sampled_from([None, A100]))
    try:
        profile = read(path, machine)
    except NarrowsError:
        return
    assert len(profile) > 0
    assert np.all(np.isfinite(profile.rows.seconds) & (profile.rows.seconds > 0))
    assert np.all(profile.rows.flops + profile.rows.bytes > 0)


@given(st.binary(max_size=200))
@settings(deadline=None, max_examples=200)
def test_any_bytes_are_read_or_refused(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("fuzz") / "fuzz.csv"
    path.write_bytes(content)
    with pytest.raises(NarrowsError):
        read(path, A100)
