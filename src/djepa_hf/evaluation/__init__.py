"""Evaluation of a pipeline that can be repeated: samples, features of them and of real images, figures, a report."""
