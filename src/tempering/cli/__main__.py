from tempering.cli import main

main()
