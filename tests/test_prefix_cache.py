"""What keeps keys and values of two profiles apart in vLLM's prefix caches, and what does not.

docs/operations.md, "Caches and profiles", says so to operators.
"""

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.kv_offload.file_mapper import FileMapper
from vllm.v1.request import Request

BLOCK_SIZE = 16


def block_hashes(cache_salt: str | None) -> list[bytes]:
    """The keys of a prompt's blocks, as a server that has just started computes them."""
    init_none_hash(sha256)
    request = Request(
        request_id="r",
        prompt_token_ids=list(range(5 * BLOCK_SIZE)),
        sampling_params=SamplingParams(max_tokens=1),
        pooling_params=None,
        cache_salt=cache_salt,
        block_hasher=get_request_block_hasher(BLOCK_SIZE, sha256),
    )
    return list(request.block_hashes)


def test_block_hashes_do_not_know_the_profile_but_salts_do() -> None:
    """Keys are tokens and salts, alike in every process, so only salts tell servers apart."""
    unsalted = block_hashes(None)
    assert len(unsalted) == 5
    assert unsalted == block_hashes(None)
    salted = [block_hashes(profile_id) for profile_id in ("0123456789ab", "ba9876543210")]
    assert len({*unsalted, *salted[0], *salted[1]}) == 15


def test_offloaded_files_do_not_know_the_profile_but_directories_do() -> None:
    def mapper(root: str) -> FileMapper:
        return FileMapper(root, "org/model", BLOCK_SIZE, 1, 1, 1, 1, 1, 0, "torch.bfloat16")

    known = {
        "model_name", "tokens_per_hash", "blocks_per_file", "tp_size", "pp_size", "pcp_size",
        "dcp_size", "dtype", "kv_cache_groups", "inference_engine", "parallel_agnostic",
    }  # fmt: skip
    # If vLLM comes to tell configurations apart here, the page can say so.
    assert mapper("/cache").get_run_config().keys() == known
    assert mapper("/cache/a").base_path != mapper("/cache/b").base_path
