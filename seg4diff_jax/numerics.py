"""Fixes JAX's options, so that noise, masks and figures are the same however a host program has configured JAX.

`FIXED` has the options that change a number or refuse a call, with their values within `settled`. `LEFT` has the
others, which stay as the user set them. Both list the options of jax 0.10 and of 0.12, which are not all the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

FIXED: dict[str, Any] = {
    # These change the width of numbers, or the random numbers.
    "jax_enable_x64": False,
    "jax_explicit_x64_dtypes": "warn",
    "jax_default_matmul_precision": None,
    "jax_default_prng_impl": "threefry2x32",
    "jax_threefry_partitionable": True,
    "jax_random_seed_offset": 0,
    "jax_high_dynamic_range_gumbel": False,
    "jax_accurate_erf_inv": False,  # normal numbers are made by erf_inv
    # These compile the same formulas to other programs, which round differently.
    "jax_disable_jit": False,
    "jax_softmax_custom_jvp": False,
    "jax_use_direct_linearize": True,
    "jax_scan3": False,
    "jax_remat3": False,
    "jax_remat_barrier_no_cotangents": False,
    "jax_custom_jvp3": False,
    "jax_custom_vjp3": False,
    "jax_use_hlo_logistic_lowering": None,
    "eager_constant_folding": False,
    "jax_use_simplified_jaxpr_constants": False,
    "jax_embedded_constants_max_bytes": 32,
    # These refuse valid calls.
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
    "jax_allow_f16_reductions": True,
    "jax_transfer_guard": "allow",
    "jax_enable_custom_prng": False,
    "jax_legacy_prng_key": "allow",
    "jax_debug_key_reuse": False,
    "jax_auto_pcast": True,
    "jax_error_checking_behavior_nan": "ignore",
    "jax_error_checking_behavior_divide": "ignore",
    "jax_error_checking_behavior_oob": "ignore",
}
"""Options that results must not depend on, and their values within `settled`, which are JAX's defaults."""

LEFT: dict[str, str] = {
    "which devices compute, and how processes find each other": """
        jax_platforms jax_platform_name jax_xla_backend jax_backend_target jax_default_device jax_num_cpu_devices
        jax_cuda_visible_devices jax_rocm_visible_devices jax_oneapi_visible_devices jax_mock_gpu_topology
        mock_num_gpu_processes jax_pjrt_client_create_options jax_sort_devices_by_process_index
        jax_cpu_collectives_implementation jax_cpu_enable_async_dispatch jax_cpu_get_global_topology_timeout_minutes
        jax_cpu_get_local_topology_timeout_minutes jax_check_proxy_envs jax_cross_host_transfer_socket_address
        jax_cross_host_transfer_timeout_seconds jax_cross_host_transfer_transfer_size jax_cross_host_transport_addresses
        jax_force_dcn_cross_host_transfers jax_enable_preemption_service jax_enable_recoverability
        jax_distributed_verify_secure_credentials jax_mtls_ca_file jax_mtls_cert_file jax_mtls_key_file
        jax_mtls_peer_uri_prefix jax_use_cpp_shard_args""",
    "how XLA compiles, as XLA_FLAGS say it too: rounding may be that of another processor": """
        jax_optimization_level jax_disable_most_optimizations jax_exec_time_optimization_effort
        jax_memory_fitting_effort jax_memory_fitting_level jax_compiler_enable_remat_pass jax_use_shardy_partitioner
        jax_use_rgv3 jax_enable_pgle jax_pgle_profiling_runs jax_pgle_aggregation_percentile jax_xla_profile_version
        jax_threefry_gpu_kernel_lowering jax_mosaic_allow_hlo jax_mosaic_unzip_debug_locations
        jax_pallas_use_mosaic_gpu jax_pallas_auto_assign_collective_ids jax_pallas_auto_assign_collective_ids_limit""",
    "where compiled programs are kept": """
        jax_enable_compilation_cache jax_compilation_cache_dir jax_compilation_cache_check_contents
        jax_compilation_cache_expect_pgle jax_compilation_cache_include_metadata_in_key jax_compilation_cache_max_size
        jax_persistent_cache_enable_xla_caches jax_persistent_cache_min_compile_time_secs
        jax_persistent_cache_min_entry_size_bytes jax_raise_persistent_cache_errors
        jax_remove_custom_partitioning_ptr_from_cache_key jax_share_binary_between_hosts
        jax_share_binary_between_hosts_timeout_ms""",
    "checks that a user asks for; what they find ends the call": """
        jax_debug_nans jax_debug_infs jax_enable_checks jax_check_tracer_leaks jax_check_static_indices
        jax_no_tracing jax_no_execution jax_thread_guard jax_array_garbage_collection_guard jax_mutable_array_checks
        jax_pallas_enable_debug_checks jax_pallas_poison_buffers jax_debug_leaked_clients_on_clear_backends
        jax_disable_bwd_checks jax_disable_vmap_shmap_error jax_disallow_mesh_context_manager
        jax_raise_on_ppermute_sort_diff jax_experimental_unsafe_xla_runtime_errors
        jax_transfer_guard_host_to_device jax_transfer_guard_device_to_device jax_transfer_guard_device_to_host""",
    "what is logged, printed and dumped": """
        jax_log_compiles jax_explain_cache_misses jax_log_checkpoint_residuals jax_logging_level
        jax_debug_log_modules jax_distributed_debug jax_compiler_detailed_logging_min_ops jax_dump_ir_to
        jax_dump_ir_modes jax_include_debug_info_in_dumps jax_include_full_tracebacks_in_locations
        jax_traceback_filtering jax_traceback_in_locations_limit jax_tracer_error_num_traceback_frames
        jax_send_traceback_to_runtime jax_hlo_source_file_canonicalization_regex jax_source_url_schema
        jax_pprint_use_color jax_pallas_verbose_errors jax_captured_constants_report_frames
        jax_captured_constants_warn_bytes""",
    "what nothing here uses, or types alone": """
        jax2tf_associative_scan_reductions jax2tf_default_native_serialization jax_serialization_version
        jax_export_calling_convention_version jax_export_ignore_forward_compatibility
        jax_export_deserialize_expired_versions jax_bcoo_cusparse_lowering jax_use_magma
        jax_ragged_dot_use_gpu_pallas_triton_lowering jax_ragged_dot_use_ragged_dot_instruction jax_refs_to_pins
        jax_use_emit_pipeline_primitive check_vma jax_remove_size_one_mesh_axis_from_type""",
}
"""Options that stay as the user set them, by the reason for it."""


@contextmanager
def settled() -> Iterator[None]:
    """Sets the options of `FIXED` in this thread. It is a context, and also a decorator for functions that users call.

    JAX looks up compiled programs by the values of its options, so nothing is compiled again if no value differs. JAX's
    contexts hold for one thread: a thread that is started within this one has the program's own options.
    """
    with ExitStack() as contexts:
        for option, value in FIXED.items():
            if option in jax.config.values and getattr(jax.config, option) != value:
                contexts.enter_context(_context(option)(value))
        yield


def _context(option: str) -> Any:
    """Returns the context manager that sets an option in one thread.

    For some options JAX has no public name for it; it is then taken from JAX's private table of options.
    """
    named = getattr(jax, option.removeprefix("jax_"), None)
    holders: Any = jax.config
    return holders._value_holders[option] if named is None else named


@contextmanager
def computing(dtype: Any, mesh: Mesh | None) -> Iterator[None]:
    """JAX's options settled, the mesh, and products of fp32 in fp32: accelerators would take fewer bits."""
    spread = nullcontext() if mesh is None else jax.set_mesh(mesh)
    with settled(), spread, jax.default_matmul_precision("highest" if dtype == jnp.float32 else None):
        yield
