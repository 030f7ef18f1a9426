# The kernels of the CUDA part, which tests/emulated compiles for the CPU, too. Sets cuda_sources.
set(cuda_sources
    csrc/cuda/apply_rotary.cu
    csrc/cuda/attention_backward.cu
    csrc/cuda/attention_checks.cu
    csrc/cuda/attention_forward.cu
    csrc/cuda/attention_grad_keys.cu
    csrc/cuda/attention_grad_queries.cu
    csrc/cuda/attention_query_stats.cu
    csrc/cuda/personalized_ffn.cu
    csrc/cuda/tile_scheduler.cu)
