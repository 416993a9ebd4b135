"""The tritonserver process on this machine: started, supervised, checked, deployed to."""
