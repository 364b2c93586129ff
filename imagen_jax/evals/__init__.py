"""What is measured of a stage, and the arithmetic of it: statistics with their errors, retrieval, comparisons with up-sampling, the report.

It must not know the command line or the training loop; the arithmetic knows no stage and no data either, arrays in and numbers out.
"""
