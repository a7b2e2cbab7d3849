"""Settings files beside weights: config.json, params.yaml, trainer YAML, generation_config.json."""
