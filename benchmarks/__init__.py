"""What is measured, each file a command that prints one JSON line; results/ keeps the runs.

demo.py: what make train costs and learns
compare_torch.py: training, decoding, memory and start on a CPU, beside torch
moe_tiny.py: a mixture against the dense model of equal active parameters
layouts.py: what each layout costs beyond one device
steps.py: what the benchmarks of training steps share; no command
data_throughput.py: tokens a second from prepared shards
compare_llama_cpp.py: decoding a GGUF file, beside llama.cpp
decode.py: milliseconds a token and temporary bytes of decoding
decode_compiled.py: what a decode step of large models moves, by the compilers
posttrain.py: tasks after pre-training beside pre-training, and beside TRL
server_overhead.py: what the server takes beyond the engine
serving.py: what many requests cost beyond their tokens
cleaning.py: data cleaning, step by step, beside datatrove
checkpoint.py: seconds to save and restore
conversion.py: seconds and memory of maxlm.convert
guards.py: what a step pays for what watches over it
stability.py: what a step pays for each thing that steadies it
kernels_compiled.py: what the TPU compiler says of kernels and of what they replace
context_memory.py: memory as a sequence and the seq axis grow together
compile_time.py: compilation as layers and chips grow
count_lines.py: lines of the core path
plan_memory.py: memory by arithmetic beside the compiler's
"""
