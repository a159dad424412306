"""What a finished run says about itself: errors, figures and one self-contained HTML page.

`predictions.Predictions` holds one split, `errors` turns it into numbers, `figures` into matplotlib figures, and
`training.write_report` into `report.html` and `metrics.json`. Nothing here needs JAX or a device.
"""
