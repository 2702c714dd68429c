"""Methods x data sets x fractions or shots x seeds: run, choose settings, report."""
