"""From raw data to a report in resumable stages: split, reference, score, select, train, evaluate, report."""
