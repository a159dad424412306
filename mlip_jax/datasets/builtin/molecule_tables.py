"""Tables of names and SMILES from which molecules.py builds the built-in molecules."""

from __future__ import annotations

DIPEPTIDES = "Embedded Dipeptides"
DRUGS = "Embedded Drugs"
FRAGMENTS = "Embedded Fragments"
MONOMERS = "Embedded Solvents and Monomers"

# Side chains, attached to the alpha carbon. Proline forms a ring with the nitrogen, see _residue.
SIDE_CHAINS = {
    "gly": "",
    "ala": "C",
    "val": "C(C)C",
    "leu": "CC(C)C",
    "ile": "[C@@H](C)CC",
    "ser": "CO",
    "thr": "[C@H](O)C",
    "cys": "CS",
    "met": "CCSC",
    "asn": "CC(=O)N",
    "gln": "CCC(=O)N",
    "asp": "CC(=O)O",
    "glu": "CCC(=O)O",
    "lys": "CCCCN",
    "arg": "CCCNC(=N)N",
    "his": "Cc1cnc[nH]1",
    "phe": "Cc1ccccc1",
    "tyr": "Cc1ccc(O)cc1",
    "trp": "Cc1c[nH]c2ccccc12",
    "pro": None,
}

CHARGED_SIDE_CHAINS = {
    "asp-minus": "CC(=O)[O-]",
    "glu-minus": "CCC(=O)[O-]",
    "lys-plus": "CCCC[NH3+]",
    "arg-plus": "CCCNC(=[NH2+])N",
    "his-plus": "Cc1c[nH]c[nH+]1",
}

RESIDUE_PAIRS = (
    "gly-gly",
    "gly-ala",
    "ala-gly",
    "ala-ala",
    "gly-ser",
    "ser-gly",
    "ala-ser",
    "gly-cys",
    "cys-gly",
    "gly-val",
    "gly-asn",
    "asn-gly",
    "gly-thr",
    "gly-pro",
    "pro-gly",
    "ser-cys",
    "gly-asp",
    "gly-met",
)

# Skeletons and functional groups. Every pair is a molecule.
SKELETONS = {"methyl": "C", "isopropyl": "CC(C)", "phenyl": "c1ccccc1"}
GROUPS = {
    "alcohol": "O",
    "amine": "N",
    "methylamine": "NC",
    "methoxy": "OC",
    "thiol": "S",
    "methylthio": "SC",
    "methylsulfoxide": "S(=O)C",
    "methylsulfone": "S(=O)(=O)C",
    "sulfonamide": "S(=O)(=O)N",
    "carboxylic-acid": "C(=O)O",
    "methyl-ester": "C(=O)OC",
    "propanoate": "OC(=O)CC",
    "carboxamide": "C(=O)N",
    "n-ethylamide": "C(=O)NCC",
    "propanamide": "NC(=O)CC",
    "aldehyde": "C=O",
    "methylketone": "C(=O)C",
    "nitrile": "C#N",
    "nitro": "[N+](=O)[O-]",
    "urea": "NC(=O)N",
    "guanidine": "NC(=N)N",
    "amidine": "C(=N)N",
    "ethyne": "C#C",
    "ethene": "C=C",
    "thioamide": "C(=S)N",
    "carbamate": "OC(=O)N",
    "oxime": "C=NO",
}

MONOMER_SMILES = """
    water O                         ammonia N                       hydrogen-sulfide S
    methane C                       ethane CC                       propane CCC
    butane CCCC                     hexane CCCCCC                   cyclopropane C1CC1
    cyclopentane C1CCCC1            ethene C=C                      2-butene C/C=C/C
    butadiene C=CC=C                cyclohexene C1=CCCCC1           ethyne C#C
    2-butyne CC#CC                  propanol CCCO                   ethylene-glycol OCCO
    glycerol OCC(O)CO               dimethoxyethane COCCOC          diethyl-ether CCOCC
    dimethoxymethane COCOC          acrolein C=CC=O                 cyclohexanone O=C1CCCCC1
    formic-acid OC=O                lactic-acid CC(O)C(=O)O         glycolic-acid OCC(=O)O
    succinic-acid OC(=O)CCC(=O)O    acrylic-acid C=CC(=O)O          methyl-acrylate C=CC(=O)OC
    gamma-butyrolactone O=C1CCCO1   dimethyl-carbonate COC(=O)OC    propylene-carbonate CC1COC(=O)O1
    formamide NC=O                  dimethylformamide CN(C)C=O      dimethylacetamide CN(C)C(C)=O
    n-methylpyrrolidone CN1CCCC1=O  pyrrolidone O=C1CCCN1           acrylamide C=CC(N)=O
    urea NC(N)=O                    dimethylurea CNC(=O)NC          thiourea NC(N)=S
    guanidine NC(N)=N               acrylonitrile C=CC#N            trimethylamine CN(C)C
    triethylamine CCN(CC)CC         ethylenediamine NCCN            ethanolamine NCCO
    dimethylaminoethanol CN(C)CCO   hydrazine-dimethyl CNNC         methylhydrazine CNN
    methoxyamine CON                dimethylhydroxylamine CONC      dimethyl-disulfide CSSC
    ethanedithiol SCCS              mercaptoethanol OCCS            cysteamine NCCS
    sulfolane O=S1(=O)CCCC1         tetrahydrothiophene C1CCSC1     oxirane C1CO1
    propylene-oxide CC1CO1          glycidol OCC1CO1                dioxane C1COCCO1
    methylcyclopropane CC1CC1       cyclopropylmethanol OCC1CC1     methyl-ethyl-disulfide CCSSC
    cystamine NCCSSCCN              methylhydroxylamine CNO         acetohydroxamic-acid CC(=O)NO
    acetone-hydrazone CC(C)=NN      acetaldehyde-methylhydrazone CC=NNC
    ethylene-carbonate O=C1OCCO1    glycine NCC(=O)O                alanine C[C@H](N)C(=O)O
    serine OC[C@H](N)C(=O)O         cysteine SC[C@H](N)C(=O)O       taurine NCCS(=O)(=O)O
    glycinamide NCC(N)=O            ribose OC[C@H]1OC(O)[C@H](O)[C@@H]1O
    deoxyribose OC[C@H]1OC(O)C[C@@H]1O
    glucose OC[C@H]1OC(O)[C@H](O)[C@@H](O)[C@@H]1O                  toluene Cc1ccccc1
    benzene c1ccccc1                benzyl-alcohol OCc1ccccc1       benzylamine NCc1ccccc1
"""

# Rings with one position {} for a substituent (hydrogen if empty).
RINGS = {
    "2-pyridine": "c1ccnc({})c1",
    "3-pyridine": "c1cncc({})c1",
    "4-pyridine": "c1cc({})ccn1",
    "2-pyrimidine": "c1cnc({})nc1",
    "5-pyrimidine": "c1ncncc1{}",
    "pyrazine": "c1cncc({})n1",
    "3-pyridazine": "c1cnnc({})c1",
    "2-furan": "c1coc({})c1",
    "3-furan": "c1cocc1{}",
    "2-thiophene": "c1csc({})c1",
    "3-thiophene": "c1cscc1{}",
    "2-pyrrole": "c1c[nH]c({})c1",
    "4-imidazole": "c1[nH]cnc1{}",
    "2-imidazole": "c1c[nH]c({})n1",
    "4-pyrazole": "c1[nH]ncc1{}",
    "2-oxazole": "c1coc({})n1",
    "5-isoxazole": "c1cc({})on1",
    "2-thiazole": "c1csc({})n1",
    "5-isothiazole": "c1cc({})sn1",
    "3-indole": "c1ccc2c(c1)c({})c[nH]2",
    "2-benzimidazole": "c1ccc2[nH]c({})nc2c1",
    "2-naphthalene": "c1ccc2cc({})ccc2c1",
    "2-quinoline": "c1ccc2nc({})ccc2c1",
    "4-piperidine": "C1CNCCC1{}",
    "2-morpholine": "C1OC({})CNC1",
    "2-piperazine": "C1NC({})CNC1",
    "2-pyrrolidine": "C1CNC({})C1",
    "3-thiomorpholine": "C1SCC({})NC1",
    "2-oxolane": "C1COC({})C1",
    "4-oxane": "C1COCCC1{}",
    "cyclohexane": "C1CCCCC1{}",
    "cyclopentane": "C1CCCC1{}",
}

SUBSTITUENTS = {
    "h": "",
    "methyl": "C",
    "amino": "N",
    "carboxamide": "C(=O)N",
    "methoxy": "OC",
    "cyano": "C#N",
    "hydroxymethyl": "CO",
    "acetyl": "C(=O)C",
    "methylthio": "SC",
    "carboxylic-acid": "C(=O)O",
    "dimethylamino": "N(C)C",
    "sulfonamide": "S(=O)(=O)N",
}

SUBSTITUENTS_PER_RING = 3
DRUG_SMILES = """
    aspirin CC(=O)Oc1ccccc1C(=O)O   paracetamol CC(=O)Nc1ccc(O)cc1  salicylic-acid OC(=O)c1ccccc1O
    salicylamide NC(=O)c1ccccc1O    ibuprofen CC(C)Cc1ccc(cc1)C(C)C(=O)O
    phenacetin CCOc1ccc(NC(C)=O)cc1                                 benzocaine CCOC(=O)c1ccc(N)cc1
    caffeine Cn1cnc2c1c(=O)n(C)c(=O)n2C
    theophylline Cn1c(=O)c2[nH]cnc2n(C)c1=O
    theobromine Cn1cnc2c1c(=O)[nH]c(=O)n2C
    xanthine O=c1[nH]c(=O)c2[nH]cnc2[nH]1
    hypoxanthine O=c1[nH]cnc2[nH]cnc12                              nicotine CN1CCC[C@H]1c1cccnc1
    nicotinic-acid OC(=O)c1cccnc1   isoniazid NNC(=O)c1ccncc1       pyrazinamide NC(=O)c1cnccn1
    ethionamide CCc1cc(C(N)=S)ccn1  nikethamide CCN(CC)C(=O)c1cccnc1
    sulfanilamide Nc1ccc(cc1)S(N)(=O)=O
    sulfacetamide CC(=O)NS(=O)(=O)c1ccc(N)cc1
    sulfathiazole Nc1ccc(cc1)S(=O)(=O)Nc1nccs1
    sulfadiazine Nc1ccc(cc1)S(=O)(=O)Nc1ncccn1
    dapsone Nc1ccc(cc1)S(=O)(=O)c1ccc(N)cc1
    saccharin O=C1NS(=O)(=O)c2ccccc12
    barbital CCC1(CC)C(=O)NC(=O)NC1=O
    phenobarbital CCC1(c2ccccc2)C(=O)NC(=O)NC1=O
    primidone CCC1(c2ccccc2)C(=O)NCNC1=O                            ethosuximide CCC1(C)CC(=O)NC1=O
    hydantoin O=C1CNC(=O)N1         phenytoin O=C1NC(=O)C(N1)(c1ccccc1)c1ccccc1
    succinimide O=C1CCC(=O)N1       glutarimide O=C1CCCC(=O)N1      allantoin NC(=O)NC1NC(=O)NC1=O
    creatinine CN1CC(=O)NC1=N       piracetam NC(=O)CN1CCCC1=O
    levetiracetam CC[C@H](N1CCCC1=O)C(N)=O                          valproic-acid CCCC(CCC)C(=O)O
    valpromide CCCC(CCC)C(N)=O      gabapentin NCC1(CC(=O)O)CCCCC1  pregabalin CC(C)CC(CN)CC(=O)O
    gaba NCCCC(=O)O                 baclofen-core NCC(c1ccccc1)CC(=O)O
    amphetamine CC(N)Cc1ccccc1      phentermine CC(C)(N)Cc1ccccc1   phenethylamine NCCc1ccccc1
    tyramine NCCc1ccc(O)cc1         dopamine NCCc1ccc(O)c(O)c1
    noradrenaline NCC(O)c1ccc(O)c(O)c1
    adrenaline CNC[C@H](O)c1ccc(O)c(O)c1
    ephedrine CN[C@@H](C)[C@H](O)c1ccccc1                           phenylephrine CNCC(O)c1cccc(O)c1
    synephrine CNCC(O)c1ccc(O)cc1   serotonin NCCc1c[nH]c2ccc(O)cc12
    tryptamine NCCc1c[nH]c2ccccc12  histamine NCCc1c[nH]cn1
    melatonin COc1ccc2[nH]cc(CCNC(C)=O)c2c1                         metformin CN(C)C(=N)NC(N)=N
    guanfacine-core NC(=N)NC(=O)Cc1ccccc1                           methimazole Cn1cc[nH]c1=S
    propylthiouracil CCCc1cc(=O)[nH]c(=S)[nH]1
    metronidazole Cc1ncc([N+](=O)[O-])n1CCO
    nitrofural NC(=O)NN=Cc1ccc(o1)[N+](=O)[O-]
    nitroimidazole O=[N+]([O-])c1c[nH]cn1
    acetazolamide CC(=O)Nc1nnc(s1)S(N)(=O)=O                        aminothiadiazole Nc1nncs1
    hydralazine NNc1nncc2ccccc12    pyridoxine Cc1ncc(CO)c(CO)c1O   pyridoxal Cc1ncc(CO)c(C=O)c1O
    ascorbic-acid OC[C@H](O)[C@H]1OC(=O)C(O)=C1O
    biotin OC(=O)CCCC[C@@H]1SC[C@@H]2NC(=O)N[C@H]12                 pantolactone CC1(C)COC(=O)C1O
    lipoic-acid OC(=O)CCCCC1CCSS1   acetylcysteine CC(=O)N[C@@H](CS)C(=O)O
    penicillamine CC(C)(S)[C@@H](N)C(=O)O
    carbocisteine N[C@@H](CSCC(=O)O)C(=O)O
    captopril C[C@H](CS)C(=O)N1CCC[C@H]1C(=O)O
    meprobamate CCCC(C)(COC(N)=O)COC(N)=O
    felbamate NC(=O)OCC(COC(N)=O)c1ccccc1                           mephenesin Cc1ccccc1OCC(O)CO
    guaifenesin COc1ccccc1OCC(O)CO  mexiletine Cc1cccc(C)c1OCC(C)N
    tocainide Cc1cccc(C)c1NC(=O)C(C)N
    procainamide-core CN(C)CCNC(=O)c1ccc(N)cc1
    procaine-core CN(C)CCOC(=O)c1ccc(N)cc1
    antipyrine Cc1cc(=O)n(-c2ccccc2)n1C
    carbamazepine NC(=O)N1c2ccccc2C=Cc2ccccc12                      coumarin O=c1ccc2ccccc2o1
    umbelliferone O=c1ccc2ccc(O)cc2o1                               vanillin COc1cc(C=O)ccc1O
    eugenol COc1cc(CC=C)ccc1O       thymol Cc1ccc(C(C)C)c(O)c1
    menthol CC(C)[C@@H]1CC[C@@H](C)C[C@H]1O                         camphor CC1(C)C2CCC1(C)C(=O)C2
    carvone CC(=C)C1CC=C(C)C(=O)C1  naproxen-core COc1ccc2cc(CC(=O)O)ccc2c1
    ketoprofen-core OC(=O)Cc1cccc(c1)C(=O)c1ccccc1
    fenamic-acid OC(=O)c1ccccc1Nc1ccccc1
    methyl-salicylate COC(=O)c1ccccc1O                              methylparaben COC(=O)c1ccc(O)cc1
    mercaptopurine S=c1[nH]cnc2nc[nH]c12                            amantadine NC12CC3CC(CC(C3)C1)C2
    tranylcypromine NC1CC1c1ccccc1  levodopa N[C@@H](Cc1ccc(O)c(O)c1)C(=O)O
    nicotinamide-methyl CNC(=O)c1cccnc1                             adenine Nc1ncnc2[nH]cnc12
    guanine Nc1nc2[nH]cnc2c(=O)[nH]1                                cytosine Nc1cc[nH]c(=O)n1
    thymine Cc1c[nH]c(=O)[nH]c1=O   uracil O=c1cc[nH]c(=O)[nH]1     methyladenine Cn1cnc2c(N)ncnc12
    methylcytosine Cn1ccc(N)nc1=O   methyluracil Cn1ccc(=O)[nH]c1=O
    methylthymine Cc1cn(C)c(=O)[nH]c1=O
    methylguanine Cn1cnc2c1nc(N)[nH]c2=O                            thiouracil O=c1cc[nH]c(=S)[nH]1
    deoxyadenosine Nc1ncnc2c1ncn2C1CC(O)C(CO)O1
    thymidine Cc1cn(C2CC(O)C(CO)O2)c(=O)[nH]c1=O
    deoxycytidine Nc1ccn(C2CC(O)C(CO)O2)c(=O)n1
    uridine OCC1OC(C(O)C1O)n1ccc(=O)[nH]c1=O                        pyridone O=c1cccc[nH]1
"""

CHARGED_SMILES = """
    acetate CC(=O)[O-]              propanoate CCC(=O)[O-]          benzoate [O-]C(=O)c1ccccc1
    methylammonium C[NH3+]          ethylammonium CC[NH3+]          dimethylammonium C[NH2+]C
    trimethylammonium C[NH+](C)C    guanidinium NC(N)=[NH2+]        imidazolium c1c[nH]c[nH+]1
    pyridinium c1cc[nH+]cc1         methanethiolate C[S-]           phenolate [O-]c1ccccc1
    glycine-zwitterion [NH3+]CC(=O)[O-]
    alanine-zwitterion C[C@H]([NH3+])C(=O)[O-]
    beta-alanine-zwitterion [NH3+]CCC(=O)[O-]                       betaine C[N+](C)(C)CC(=O)[O-]
"""

OTHER_ELEMENTS_SMILES = """
    fluoromethane CF                chloromethane CCl               bromomethane CBr
    dichloromethane ClCCl           chloroform ClC(Cl)Cl            trifluoroethanol OCC(F)(F)F
    trifluoroacetic-acid OC(=O)C(F)(F)F                             fluorobenzene Fc1ccccc1
    chlorobenzene Clc1ccccc1        bromobenzene Brc1ccccc1         4-chlorophenol Oc1ccc(Cl)cc1
    2-chloropyridine Clc1ccccn1     fluorouracil Fc1c[nH]c(=O)[nH]c1=O
    chloroethanol OCCCl             chlorzoxazone Clc1ccc2oc(=O)[nH]c2c1
    trimethylphosphine CP(C)C       trimethylphosphine-oxide CP(C)(C)=O
    dimethyl-methylphosphonate COP(C)(=O)OC
    trimethyl-phosphate COP(=O)(OC)OC                               methylphosphonic-acid CP(=O)(O)O
"""
