"""What does W8 cost a model, and how much of that can be had back? Calibrates MODEL and writes a profile.

Runs real text through the model one decoder layer at a time, finds for every linear the input scaling with which
W8A8 arithmetic comes closest to full precision, and stores the scales. `profile: DIR` in the MorphServe config
uses them when it packs W8 layers.

Output columns: layer, then for each linear the exponent chosen and the output error without and with it (squared
error over power, mean over tokens).
Last stdout line: one JSON document {"profile": DIR, "fingerprint", "layers", "error_plain", "error"}.

    python scripts/profile_layers.py MODEL --text wikitext2-valid.txt --out profiles/smollm2
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", help="directory or hub name")
    parser.add_argument("--text", nargs="+", type=Path, required=True, help="calibration text, one domain each")
    parser.add_argument("--out", type=Path, required=True, help="directory of the profile; must not exist yet")
    parser.add_argument("--windows", type=int, default=6, help="windows per file")
    parser.add_argument("--length", type=int, default=512, help="tokens per window")
    args = parser.parse_args(argv)

    import torch
    import transformers
    from rich.progress import Progress

    from morphserve.errors import MorphServeError
    from morphserve.profiling import decoder_layers, norms_of, smooth_model, token_windows
    from morphserve.version import __version__
    from quant_layers import ProfileError, base_fingerprint, write_profile

    start = time.perf_counter()
    try:
        if args.out.exists():
            raise ProfileError(f"{args.out} exists; give another --out, or delete it")
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
        windows = token_windows(tokenizer, args.text, args.windows, args.length)
        model = transformers.AutoModelForCausalLM.from_pretrained(args.model, dtype="auto").eval()
        layers = decoder_layers(model)
        fingerprint = base_fingerprint(dict(norms_of(layers)))
        model.float()
        with Progress(transient=True, disable=not sys.stderr.isatty()) as progress:
            task = progress.add_task("layers", total=len(layers))
            scales = smooth_model(model, windows, lambda *_: progress.advance(task))
        figures = {
            str(layer): {
                name: {"exponent": s.exponent, "error": s.error, "error_plain": s.error_plain}
                for name, s in row.items()
            }
            for layer, row in scales.items()
        }
        made = {
            "model": args.model,
            "morphserve": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "text": [file.name for file in args.text],
            "windows": args.windows,
            "length": args.length,
        }
        write_profile(
            args.out,
            fingerprint,
            {layer: {name: s.values for name, s in row.items()} for layer, row in scales.items()},
            made,
            {"smoothing": figures, "seconds": round(time.perf_counter() - start, 1)},
        )
    except (MorphServeError, ProfileError, OSError) as error:
        sys.stderr.write(f"profile_layers: {error}\n")
        return 1
    for layer, row in figures.items():
        cells = (f"{n} {f['exponent']:.1f} {f['error_plain']:.1e} > {f['error']:.1e}" for n, f in row.items())
        sys.stdout.write(f"{layer:>3}  " + "  ".join(cells) + "\n")
    errors = [f for row in figures.values() for f in row.values()]
    document = {
        "profile": str(args.out),
        "fingerprint": fingerprint,
        "layers": len(figures),
        "error_plain": sum(f["error_plain"] for f in errors) / len(errors),
        "error": sum(f["error"] for f in errors) / len(errors),
    }
    sys.stdout.write(json.dumps(document) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
