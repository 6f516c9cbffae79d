"""The Kubernetes host of Tidegate: `Model` and `Pool` in, Ray clusters and Serve applications out."""
