"""Human comparison of pictures: the rating page, the key, and the analysis.

It must not know models or training.
"""
