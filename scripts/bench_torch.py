"""Decode and prefill of a Llama shape in PyTorch, eager and compiled, with random bf16 weights.

The figures stand beside those of `headstart bench engine --device cuda --shape SHAPE`, which measures
the same: batches of 1, 8, 64 and 256 sequences with 128 positions each, and a prompt of 2,048 tokens.
Usage: python3 scripts/bench_torch.py llama-3.2-3b|llama-3.1-8b|llama-3.3-70b [--layers N]
"""

import argparse
import time

import torch
import torch.nn.functional as F

SHAPES = {
    "llama-3.2-3b": (3072, 8192, 28, 24),
    "llama-3.1-8b": (4096, 14336, 32, 32),
    "llama-3.3-70b": (8192, 28672, 80, 64),
}
VOCAB, KV_HEADS, HEAD_DIM = 128256, 8, 128
CONTEXT, STEPS, PROMPT = 128, 32, 2048


class Layer(torch.nn.Module):
    def __init__(self, hidden, mlp, heads):
        super().__init__()
        self.heads = heads
        matrix = lambda rows, cols: torch.nn.Parameter(
            torch.randn(rows, cols, dtype=torch.bfloat16, device="cuda") * cols**-0.5
        )
        self.qkv = matrix((heads + 2 * KV_HEADS) * HEAD_DIM, hidden)
        self.out = matrix(hidden, heads * HEAD_DIM)
        self.gate_up = matrix(2 * mlp, hidden)
        self.down = matrix(hidden, mlp)
        self.norms = torch.nn.Parameter(torch.ones(2, hidden, dtype=torch.bfloat16, device="cuda"))

    def forward(self, x, cos, sin, keys, values, position):
        batch, tokens, hidden = x.shape
        normed = F.rms_norm(x, (hidden,), self.norms[0])
        qkv = F.linear(normed, self.qkv).view(batch, tokens, -1, HEAD_DIM).transpose(1, 2)
        q, k, v = qkv.split([self.heads, KV_HEADS, KV_HEADS], dim=1)
        rotate = lambda t: t * cos + torch.cat((-t[..., 64:], t[..., :64]), dim=-1) * sin
        q, k = rotate(q), rotate(k)
        keys.index_copy_(2, position, k)
        values.index_copy_(2, position, v)
        seen = torch.arange(keys.shape[2], device="cuda")[None, :] <= position[:, None]
        mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen, enable_gqa=True)
        x = x + F.linear(mixed.transpose(1, 2).reshape(batch, tokens, -1), self.out)
        gate, up = F.linear(F.rms_norm(x, (hidden,), self.norms[1]), self.gate_up).chunk(2, dim=-1)
        return x + F.linear(F.silu(gate) * up, self.down)


class Model(torch.nn.Module):
    def __init__(self, hidden, mlp, layers, heads):
        super().__init__()
        self.hidden = hidden
        self.layers = torch.nn.ModuleList(Layer(hidden, mlp, heads) for _ in range(layers))
        self.embed = torch.nn.Parameter(
            torch.randn(VOCAB, hidden, dtype=torch.bfloat16, device="cuda") * hidden**-0.5
        )
        inverse = 500000.0 ** (-torch.arange(0, HEAD_DIM, 2, device="cuda") / HEAD_DIM)
        self.register_buffer("inverse", torch.cat((inverse, inverse)))

    def forward(self, tokens, position, cache):
        x = F.embedding(tokens, self.embed)
        angles = position[:, None] * self.inverse
        cos, sin = angles.cos().bfloat16(), angles.sin().bfloat16()
        for layer, (keys, values) in zip(self.layers, cache):
            x = layer(x, cos, sin, keys, values, position)
        last = F.rms_norm(x[:, -1], (self.hidden,))
        return F.linear(last, self.embed).argmax(-1)


def cache(layers, batch, length):
    shape = (batch, KV_HEADS, length, HEAD_DIM)
    zeros = lambda: torch.zeros(shape, dtype=torch.bfloat16, device="cuda")
    return [(zeros(), zeros()) for _ in range(layers)]


def seconds(work, runs):
    work()
    work()
    torch.cuda.synchronize()
    begun = time.perf_counter()
    for _ in range(runs):
        work()
    torch.cuda.synchronize()
    return (time.perf_counter() - begun) / runs


@torch.inference_mode()
def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("shape", choices=SHAPES)
    parser.add_argument("--layers", type=int)
    args = parser.parse_args()
    hidden, mlp, layers, heads = SHAPES[args.shape]
    layers = min(layers, args.layers or layers)
    model = Model(hidden, mlp, layers, heads)
    print(f"{args.shape}, {layers} layers, torch {torch.__version__}")
    ways = {"eager": model, "compiled": torch.compile(model, mode="reduce-overhead")}
    for name, run in ways.items():
        for batch in (1, 8, 64, 256):
            kv = cache(layers, batch, CONTEXT + STEPS)
            tokens = torch.ones(batch, 1, dtype=torch.long, device="cuda")
            position = torch.tensor([CONTEXT], device="cuda")
            step = seconds(lambda: run(tokens, position, kv), STEPS)
            print(f"{name} decode, batch {batch:3}: {step * 1e3:8.2f} ms, {batch / step:8.0f} tokens/s")
            del kv
    kv = cache(layers, 1, PROMPT)
    tokens = torch.ones(1, PROMPT, dtype=torch.long, device="cuda")
    position = torch.arange(PROMPT, device="cuda")
    step = seconds(lambda: model(tokens, position, kv), 5)
    print(f"eager prefill: {PROMPT / step:.0f} tokens/s")


if __name__ == "__main__":
    main()
