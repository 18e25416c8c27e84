# SPDX-License-Identifier: Apache-2.0
"""The files of the teacher's answers: whole or not there, checked by content, read by row."""

import json
import os
import threading

import pytest
import torch
from full_disk import file_size_limit

from trl_selfdistill.trainers.hidden_state_cache import (
    HiddenStateCache,
    format_bytes,
    read_num_tokens,
    write_layout,
)


HIDDEN = 8


def new_cache(folder, num_tokens, dtype=torch.float32) -> HiddenStateCache:
    return HiddenStateCache(folder, torch.tensor(num_tokens), HIDDEN, dtype)


def states_of(row: int, count: int) -> torch.Tensor:
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(row))


def fill(cache: HiddenStateCache, chunks=None) -> None:
    for chunk in range(len(cache.chunks)) if chunks is None else chunks:
        counts = [int(cache.num_tokens[row]) for row in cache.chunks[chunk]]
        rows = list(zip(cache.chunks[chunk], counts, strict=True))
        states = torch.cat([states_of(row, count) for row, count in rows])
        cache.write(chunk, states, torch.cat([torch.full((count,), row) for row, count in rows]))


@pytest.mark.parametrize("num_tokens", [[3] * 40, [0, 5, 0, 1, 90, 2, 0], [7], [0, 0]])
def test_chunks_are_all_rows_in_order(tmp_path, num_tokens):
    cache = new_cache(tmp_path, num_tokens)
    assert [row for chunk in cache.chunks for row in chunk] == list(range(len(num_tokens)))
    fill(cache)
    assert cache.missing() == [] and not any(cache.find_damage(chunk) for chunk in range(len(cache.chunks)))


def test_rows_are_read_in_the_order_asked_for(tmp_path):
    counts = [2, 0, 5, 1, 3, 4, 1, 1, 6, 2, 3, 1, 2, 2, 9, 1, 1, 4]
    fill(new_cache(tmp_path, counts))
    rows = [17, 0, 3, 3, 1, 14]  # a row may come twice: accelerate fills up the last batch
    hidden_states, labels = new_cache(tmp_path, counts).read(rows)
    torch.testing.assert_close(hidden_states, torch.cat([states_of(r, counts[r]) for r in rows]), rtol=0, atol=0)
    assert labels.tolist() == [row for row in rows for _ in range(counts[row])]


def test_bf16_halves_the_size_and_rounds(tmp_path):
    counts = [100] * 20
    exact, rounded = new_cache(tmp_path / "a", counts), new_cache(tmp_path / "b", counts, torch.bfloat16)
    assert exact.num_bytes == 2000 * (HIDDEN * 4 + 4) and rounded.num_bytes == 2000 * (HIDDEN * 2 + 4)
    for cache in (exact, rounded):
        cache.folder.mkdir()
        fill(cache)
    full, half = (cache.read([3, 9])[0] for cache in (exact, rounded))
    assert half.dtype == torch.bfloat16 and torch.equal(half, full.to(torch.bfloat16))
    on_disk = sum(file.stat().st_size for file in rounded.folder.iterdir())
    assert rounded.num_bytes < on_disk < rounded.num_bytes + 400 * len(rounded.chunks)  # a header a chunk


def test_what_was_cut_off_is_missing_and_nothing_else(tmp_path):
    cache = new_cache(tmp_path, [3] * 40)
    fill(cache, [0, 2])
    assert new_cache(tmp_path, [3] * 40).missing() == [c for c in range(len(cache.chunks)) if c not in (0, 2)]


@pytest.mark.parametrize("position", [0, 8, 40, -1, -200])
def test_a_flipped_byte_anywhere_is_found(tmp_path, position):
    cache = new_cache(tmp_path, [30] * 40)
    fill(cache, [1])
    assert cache.find_damage(1) is None
    content = bytearray(cache.file(1).read_bytes())
    content[position] ^= 0x04
    cache.file(1).write_bytes(content)
    assert str(cache.file(1)) in cache.find_damage(1)


def test_a_truncated_chunk_is_found(tmp_path):
    cache = new_cache(tmp_path, [30] * 40)
    fill(cache, [1])
    cache.file(1).write_bytes(cache.file(1).read_bytes()[:-10])
    assert "cut off" in cache.find_damage(1)


def test_a_chunk_of_another_layout_is_found(tmp_path):
    fill(new_cache(tmp_path, [30] * 40), [1])
    assert "shape" in new_cache(tmp_path, [20] * 40).find_damage(1)


def test_a_full_disk_leaves_nothing_half_written(tmp_path):
    cache = new_cache(tmp_path, [300] * 40)
    fill(cache, [0])
    with file_size_limit(1000), pytest.raises(OSError, match="chunk-00001.*teacher_cache_dir"):
        fill(cache, [1])
    assert [file.name for file in tmp_path.iterdir()] == ["chunk-00000.safetensors"]
    assert cache.find_damage(0) is None


def test_a_disk_without_room_is_refused_before(tmp_path):
    cache = new_cache(tmp_path, [10**15])
    with pytest.raises(OSError, match=r'needs 36000.0 TB more in .* free.*teacher_cache_dtype="bfloat16"'):
        cache.check_space()
    small = new_cache(tmp_path, [10] * 40)
    fill(small)
    small.check_space()


def test_jobs_that_write_at_the_same_time_do_not_disturb_each_other(tmp_path):
    counts = [50] * 64
    jobs = [threading.Thread(target=fill, args=(new_cache(tmp_path, counts),)) for _ in range(4)]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    cache = new_cache(tmp_path, counts)
    assert cache.missing() == [] and not any(cache.find_damage(chunk) for chunk in range(len(cache.chunks)))
    assert not list(tmp_path.glob("*.partial"))


def test_a_reader_keeps_its_content_while_another_job_writes(tmp_path):
    cache = new_cache(tmp_path, [50] * 64)
    fill(cache)
    before = cache.read([0])[0].clone()
    other = new_cache(tmp_path, [50] * 64)
    rows = other.chunks[0]
    other.write(0, torch.zeros(50 * len(rows), HIDDEN), torch.zeros(50 * len(rows)))
    assert torch.equal(cache.read([0])[0], before) and not torch.equal(other.read([0])[0], before)


def test_leftovers_of_the_dead_are_removed_and_not_of_the_living(tmp_path):

    cache = new_cache(tmp_path, [1])
    dead, living = tmp_path / "chunk-00000.safetensors.a.partial", tmp_path / "chunk-00000.safetensors.b.partial"
    for file in (dead, living):
        file.write_bytes(b"half")
    os.utime(dead, (0, 0))
    cache.remove_leftovers()
    assert not dead.exists() and living.exists()


def test_the_layout_is_read_as_written_and_a_damaged_one_refused(tmp_path):
    folder = tmp_path / "new"
    assert read_num_tokens(folder) is None
    folder.mkdir()
    write_layout(folder, torch.tensor([3, 0, 2]), {"teacher": "abc"})
    assert read_num_tokens(folder).tolist() == [3, 0, 2]
    assert json.loads((folder / "cache.json").read_text()) == {"teacher": "abc"}
    file = folder / "rows.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match="rows.safetensors is damaged.*Delete it"):
        read_num_tokens(folder)
    file.write_bytes(content[:-5])
    with pytest.raises(ValueError, match="rows.safetensors is cut off"):
        read_num_tokens(folder)


def test_sizes_in_words():
    assert [format_bytes(n) for n in (0, 999, 1500, 2e9, 5e15)] == ["0 B", "999 B", "1.5 kB", "2.0 GB", "5000.0 TB"]
