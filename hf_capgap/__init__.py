"""hf_capgap: small language models cut out of and distilled from big ones, the way the capacity-gap papers say."""
