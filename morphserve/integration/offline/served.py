"""What a server would be, without one: in which dtype, on how many ranks, compiled or not, with which formats."""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict

from morphserve.prepared import Place


def main(argv: Sequence[str] | None = None) -> int:
    """Print JSON, see the document below. Its words are those of `vllm serve`."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    from morphserve.integration.start import FOUND, KEY, formats_over, levels_of_a_format, serving_residence

    parser = EngineArgs.add_cli_args(FlexibleArgumentParser(prog="served", conflict_handler="resolve"))
    args = EngineArgs.from_cli_args(parser.parse_args(argv))
    # Nothing is kept, so that a place for it must be no matter: whoever asks may have another one.
    settings = {"policy": {"kind": "static", "level": 0}, "prepared": False, "cache_dir": tempfile.gettempdir()}
    args.additional_config = {KEY: settings}
    config = args.create_engine_config()
    place: Place = getattr(config, FOUND).place
    num_layers = config.model_config.get_total_num_hidden_layers()
    document = {
        "place": asdict(place),
        "formats": list(formats_over(config.model_config)),
        "in_pages": serving_residence().in_pages,
        "levels_of_a_format": levels_of_a_format(num_layers) if serving_residence().in_pages else None,
        "with_profile": config.model_config.quantization is None,
    }
    sys.stdout.write("\n" + json.dumps(document) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
