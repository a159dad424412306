"""Reports of finished runs: errors, figures and one self-contained HTML page per run.

For a training run, `predictions.Predictions` contains the results of one split, `errors` computes
metrics from it, `error_figures` draws them, and `training.write_report` writes
`report.html` and `metrics.json`. Computing errors and figures requires neither JAX nor a device.
"""
